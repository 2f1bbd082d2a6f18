// CopyWorldSteps.swift: what the operator asks for, and the actions of `CopySteps` as the simulated site carries them out.
//
// Between any two of them the process may be killed, power may be lost, and a save may fail.

import FlashCopies
import Groups
import Volumes

/// An operation under way.
final class SimulatedWork {
    let volumes: [CopiedVolume]
    /// Of these a deliberate fault may leave something out.
    let kind: Kind
    enum Kind { case take, retake, restore, end }

    init(_ kind: Kind, _ volumes: [CopiedVolume]) { (self.kind, self.volumes) = (kind, volumes) }
}

extension CopyWorld {
    // MARK: The operator

    func operate() {
        let members = volumes.count > 1 && random.chance(50) ? volumes : [random.one(of: volumes)!]
        let names = members[0].table.copies.filter { $0.isListed && $0.state != .lost }.map(\.name)
        let named = random.one(of: names)
        // Those that have one of that name.
        let found = members.compactMap { volume in
            volume.table.copies.first { $0.name == named && $0.isListed }.map { (volume: volume, copy: $0) }
        }
        let isRestoring = volumes.contains { $0.table.restoring != nil || $0.shutsHostsOut }
        switch random.below(10) {
        case 0...2: if !isRestoring { create(members, nil) }
        case 3: if !isRestoring, found.count == members.count { create(members, found.map(\.copy)) }
        case 4, 5: if !isRestoring, !found.isEmpty { refresh(found.map(\.volume), found.map(\.copy)) }
        case 6: if !isRestoring, found.count == members.count { restore(members, found.map(\.copy)) }
        case 7 where random.chance(30):
            guard let (volume, copy) = found.first, volume.table.restoring?.copy != copy.id else { return }
            _ = volume.amend(.set(copy.id, rate: nil, writable: !copy.isWritable))
        default:
            let left = found.filter { $0.volume.table.restoring?.copy != $0.copy.id }
            if !left.isEmpty, left[0].volume.table.copies.count > 2 || random.chance(30) {
                withdraw(left.map(\.volume), left.map(\.copy))
            }
        }
    }

    private func create(_ members: [CopiedVolume], _ origins: [CopyRecord]?) {
        if members.contains(where: { $0.table.copies.count > 6 }) { return }
        if let origins, origins.contains(where: { $0.state != .active }) { return }
        let name = "c\(steps)"
        let set = "\(name) of \(members.count)"
        var draft = CopyDraft(volume: "", name: name)
        draft.isFilled = random.chance(filled)
        draft.rate = random.chance(70) ? 0 : 4_000_000
        draft.isWritable = random.chance(writable)
        draft.isDurable = random.chance(25)
        draft.set = set
        let drafts = members.indices.map { index in
            var own = draft
            own.volume = "\(members[index].index)"
            own.target = random.chance(30) ? "/target" : nil
            own.origin = origins.map {
                CopyDraft.Origin(
                    id: $0[index].id, name: $0[index].name, order: $0[index].order, isDurable: $0[index].isDurable)
            }
            return own
        }
        let isCompared = origins == nil && random.chance(10)
        note("\(name) of volumes \(members.map(\.index)) is taken\(origins == nil ? "" : " of what copies hold")")
        command(TakeCopies(drafts, at: isCompared ? .nextPoint : .now), .take, members) { [unowned self] result in
            guard isCompared, case .success(let made) = result else { return }
            for (volume, copy) in zip(members, made) { leave(volume, copy.id) }
        }
    }

    private func refresh(_ members: [CopiedVolume], _ copies: [CopyRecord]) {
        guard !copies.contains(where: { $0.state == .withdrawing }) else { return }
        note("\(copies[0].name) of volumes \(members.map(\.index)) is taken anew")
        for copy in copies { if let set = copy.set { partedSets.insert(set) } }
        let ids = copies.map(\.id)
        let names = members.map { "\($0.index)" }
        command(TakeOutOfUse(ids, volumes: names), .retake, members) { [unowned self] result in
            guard case .success = result else { return }
            command(RetakeCopies(ids, name: copies[0].name, volumes: names), .retake, members) { _ in }
        }
    }

    private func restore(_ members: [CopiedVolume], _ copies: [CopyRecord]) {
        guard copies.allSatisfy({ $0.state == .active }), !members.contains(where: \.hasStalled),
            !members.contains(where: { $0.table.copies.count > 7 })
        else { return }
        note("volumes \(members.map(\.index)) are restored from \(copies[0].name)")
        let drafts = members.map { CopyDraft(volume: "\($0.index)", name: "before \(steps)") }
        command(RestoreVolumes(copies, keeping: drafts, decision: "\(steps)"), .restore, members) { _ in }
    }

    private func withdraw(_ members: [CopiedVolume], _ copies: [CopyRecord]) {
        note("\(copies[0].name) of volumes \(members.map(\.index)) is withdrawn")
        for copy in copies { if let set = copy.set { partedSets.insert(set) } }
        command(WithdrawCopies(copies.map(\.id)), .end, members) { _ in }
    }

    /// One of the operator's at a time.
    private func command<Operation: CopySteps>(
        _ operation: Operation, _ kind: SimulatedWork.Kind, _ members: [CopiedVolume],
        then done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        operating = true
        run(operation, SimulatedWork(kind, members)) { [unowned self] result in
            operating = false
            var end = "done"
            if case .failure(let error) = result {
                end = "failed"
                note("it fails: \(error)")
            }
            happened["\(type(of: operation)) \(members.count) \(end)", default: 0] += 1
            done(result)
        }
    }

    // MARK: Events

    func leave(_ volume: CopiedVolume, _ id: CopyID) {
        volume.volume.withdrawCopy(id)
        volume.process.pump()
        if volume.volume.copy(id) == nil { withdrawn(volume, id) }
    }

    func withdrawn(_ volume: CopiedVolume, _ id: CopyID) {
        volume.note("copy \(id.label) has left")
        losePowerSoon()
        run(ForgetCopy(id, of: 0, wasInChain: true), SimulatedWork(.end, [volume])) { _ in
            volume.readyTasks.removeValue(forKey: id)?()
        }
    }

    func complete(_ volume: CopiedVolume, _ id: CopyID) {
        run(CompleteCopy(id), SimulatedWork(.end, [volume])) { result in
            guard case .success(true) = result else { return }
            volume.images[id]?.flushed(issuedAt: volume.flushedAt[id] ?? 0)
            volume.note("copy \(id.label) is complete")
        }
    }

    // MARK: Actions

    private func run<Operation: CopySteps>(
        _ operation: Operation, _ work: SimulatedWork,
        done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        goOn(operation, .begin, work, done)
    }

    private func goOn<Operation: CopySteps>(
        _ operation: Operation, _ answer: CopyAnswer, _ work: SimulatedWork,
        _ done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        var operation = operation
        switch operation.next(after: answer, work.volumes.map(\.table)) {
        case .perform(let action):
            let taken = operation
            perform(action, work) { [unowned self] answer in
                tasks.append { [unowned self] in goOn(taken, answer, work, done) }
            }
        case .done(let outcome): done(.success(outcome))
        case .failed(let error): done(.failure(error))
        }
    }

    private func perform(_ action: CopyAction, _ work: SimulatedWork, _ done: @escaping (CopyAnswer) -> Void) {
        func volume(_ index: Int) -> CopiedVolume { work.volumes[index] }
        switch action {
        case .look(let index, let id):
            let engine = volume(index).volume
            done(
                .chain(
                    ChainLook(
                        isDurable: engine.chainIsDurable, nextOrder: volume(index).nextOrder, points: [],
                        count: engine.chainCount, copy: id.flatMap { engine.copy($0)?.state }, at: Double(steps))))
        case .change(let index, let change): done(CopyAnswer(isDone: volume(index).amend(change)))
        case .acknowledge(let index, let change):
            volume(index).acknowledge(change)
            done(.done)
        case .save(let index): done(CopyAnswer(isDone: volume(index).settle()))
        case .onceSaved(let aftermath): onceSaved(aftermath, work, done)
        case .makeFiles(let index, let copy, let owner):
            let isZero = volume(index).makeFiles(copy, over: owner)
            done(isZero.map { .files(targetIsZero: $0) } ?? .failed(SimulationFailure("the target is in use")))
        case .discardFiles(let index, let id, let target):
            volume(index).remove(id, target)
            done(.done)
        case .removeFiles(let index, let id, let target):
            volume(index).removeFiles(id, target: target)
            done(.done)
        case .flush(let index): done(CopyAnswer(isDone: leavesOut(work) || volume(index).flush() == 0))
        case .flushChanges(let index):
            done(CopyAnswer(isDone: leavesOut(work) || fault == .forgetUnflushed || volume(index).flushChanges() == 0))
        case .flushTarget(let index, let id): done(CopyAnswer(isDone: flushTarget(volume(index), id)))
        case .flushBitmap(let index, let id):
            done(CopyAnswer(isDone: leavesOut(work) || volume(index).bitmaps[id]?.flush() ?? 0 == 0))
        case .enter(let entries), .enterWithPoint(let entries): done(enter(entries, work))
        case .leave(let index, let id):
            leave(volume(index), id)
            done(.done)
        case .awaitGone(let places):
            wait(200) {
                places.allSatisfy { work.volumes[$0.volume].bitmaps[$0.id] == nil }
            } then: {
                done(.done)
            }
        case .takeOutOfUse(let index, let id):
            volume(index).readyTasks[id] = { done(.done) }
            volume(index).volume.beginRefresh(id)
            volume(index).process.pump()
            if volume(index).volume.copy(id) == nil { volume(index).readyTasks.removeValue(forKey: id)?() }
        case .endReaders(let index, let id):
            wait(.max) {
                volume(index).images[id]?.isBusy(0..<CopiedVolume.sectors) != true
            } then: {
                done(.done)
            }
        case .shutHostsOut, .admitHosts, .makeRestoreBitmap, .beginRestore, .flushRestoreBitmap, .goOnRestoring,
            .dropRestore:
            performRestore(action, work, done)
        case .findTaken, .openFiles, .failPoint, .loseFiles, .resume, .takeRole, .resumeRestore, .loseFailover,
            .forgetRestore,
            .confirm, .finishResuming:
            fail("'\(action)' is only a start's")
        }
    }

    private func performRestore(
        _ action: CopyAction, _ work: SimulatedWork, _ done: @escaping (CopyAnswer) -> Void
    ) {
        switch action {
        case .shutHostsOut(let index):
            let volume = work.volumes[index]
            volume.shutsHostsOut = true
            let last = volume.lastRequest
            wait(.max) {
                volume.hasAnswered(upTo: last)
            } then: {
                done(.done)
            }
        case .admitHosts(let index):
            work.volumes[index].shutsHostsOut = false
            done(.done)
        case .makeRestoreBitmap(let index):
            work.volumes[index].pending = SimulatedBitmap(bits: 64)
            done(.done)
        case .beginRestore(let index, let id): done(beginRestore(work.volumes[index], id))
        case .flushRestoreBitmap(let index):
            if !leavesOut(work) { work.volumes[index].pending?.flush() }
            done(.done)
        case .goOnRestoring(let index):
            work.volumes[index].unrestored = nil
            work.volumes[index].volume.continueRestore()
            work.volumes[index].process.pump()
            done(.done)
        case .dropRestore(let index):
            dropRestore(work.volumes[index])
            done(.done)
        default: fail("'\(action)' is none of a restore")
        }
    }

    /// A deliberate fault makes its flushes do nothing.
    private func leavesOut(_ work: SimulatedWork) -> Bool {
        switch fault {
        case .skipFlushes: true
        case .activateUnflushed: work.kind == .take
        case .decideUnflushed: work.kind == .restore
        case .completeUnflushed: work.kind == .end
        default: false
        }
    }

    /// Looks now and then until something is so.
    private func wait(_ times: Int, _ condition: @escaping () -> Bool, then done: @escaping () -> Void) {
        if times == 0 || condition() { return done() }
        tasks.append { [unowned self] in wait(times == .max ? times : times - 1, condition, then: done) }
    }

    private func onceSaved(_ aftermath: Aftermath, _ work: SimulatedWork, _ done: @escaping (CopyAnswer) -> Void) {
        if fault == .leaveUnsaved || !work.volumes.contains(where: \.isUnsaved) {
            return run(aftermath, work) { _ in done(.done) }
        }
        wait(.max) {
            !work.volumes.contains(where: \.isUnsaved)
        } then: { [unowned self] in
            run(aftermath, work) { _ in }
        }
        done(.done)
    }

    // MARK: The chain

    /// All at one instant: nothing else happens meanwhile.
    private func enter(_ entries: [CopyEntry], _ work: SimulatedWork) -> CopyAnswer {
        var missed: Set<Int> = []
        for (place, entry) in entries.enumerated() where !enter(entry, work.volumes[entry.volume]) {
            missed.insert(place)
        }
        let isApart = entries.count > 1 && random.chance(10)
        return .entered(missed: missed, apart: isApart ? Refusal("the hold's deadline has passed", .passing) : nil)
    }

    private func enter(_ entry: CopyEntry, _ volume: CopiedVolume) -> Bool {
        let id = entry.copy.id
        let isIn = volume.enterChain(entry.copy) { engine, copy in
            switch entry.place {
            case .newest:
                volume.images[id] = volume.contents.copied(at: steps)
                engine.addCopy(copy)
            case .below(let origin):
                guard engine.copy(origin)?.state == .active else { return false }
                volume.images[id] = volume.images[origin]?.copied(at: steps)
                engine.cloneCopy(origin, as: copy)
            case .insteadOf(let old):
                guard engine.copy(old) == nil || engine.mayRetake(old) else { return false }
                volume.images[id] = volume.contents.copied(at: steps)
                guard engine.copy(old) != nil else {
                    engine.addCopy(copy)
                    return true
                }
                volume.markTaken(id)
                engine.retakeCopy(old, as: copy)
            }
            return true
        }
        volume.note(
            "copy \(id.label) \(isIn ? "is in the chain" : "has no place")\(entry.copy.isDurable ? ", durable" : "")")
        return isIn
    }

    private func flushTarget(_ volume: CopiedVolume, _ id: CopyID) -> Bool {
        guard fault != .skipFlushes, fault != .completeUnflushed, let copy = volume.table[id] else { return true }
        volume.flushedAt[id] = steps
        let errno = volume.targets[copy.targetOwner]?.flush() ?? 0
        guard errno != 0 else { return true }
        volume.volume.targetFlushFailed(id, errno: errno)
        volume.process.pump()
        return false
    }

    // MARK: Restores

    private func beginRestore(_ volume: CopiedVolume, _ id: CopyID) -> CopyAnswer {
        guard let state = volume.volume.copy(id)?.state, state == .active || fault == .restoreFromFailed else {
            return .failed(SimulationFailure("the copy has failed meanwhile"))
        }
        volume.unrestored = volume.contents
        volume.overwritten = volume.contents
        if let image = volume.images[id] {
            volume.contents.restored(from: image, at: steps)
        } else {
            fail("volume \(volume.index) is restored from a copy that has failed")
        }
        volume.startRestore(from: id, fresh: true)
        return .done
    }

    private func dropRestore(_ volume: CopiedVolume) {
        volume.volume.cancelRestore()
        volume.process.pump()
        volume.pending = nil
        guard let before = volume.unrestored else { return }
        (volume.contents, volume.unrestored) = (before, nil)
        volume.flippedAt = steps
    }
}
