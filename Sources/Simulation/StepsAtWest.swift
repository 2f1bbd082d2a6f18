// StepsAtWest.swift: the actions of `Steps`, as the simulated secondary carries them out.
//
// Between any two of them, and while one waits, the process may be killed, power may be lost, and a save may fail.

import Groups
import Volumes

extension World {
    /// One action after the other; a kill ends it.
    func runWest<Operation: Steps>(
        _ steps: Operation, done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        westIsBusy = true
        goOn(steps, after: .begin, westLife, done)
    }

    private func goOn<Operation: Steps>(
        _ steps: Operation, after answer: Answer, _ life: Int,
        _ done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        guard life == westLife else { return }
        var steps = steps
        switch steps.next(after: answer, westRecord) {
        case .perform(let action):
            let taken = steps
            perform(action) { [unowned self] answer in
                westTasks.append { [unowned self] in goOn(taken, after: answer, life, done) }
            }
        case .done(let outcome):
            westIsBusy = false
            done(.success(outcome))
        case .failed(let error):
            westIsBusy = false
            done(.failure(error))
        }
    }

    private func perform(_ action: SiteAction, _ done: @escaping (Answer) -> Void) {
        switch action {
        case .settle: done(answer(fault == .openUnsaved || saveWest(westGroup.settle())))
        case .change(let change): done(answer(take(change)))
        case .fence(let next):
            session = next
            awaitFence(westLife) { done(.done) }
        case .survey:
            let writes = west.reduce(0) { $0 + $1.volume.modifyingInFlight }
            let retired = (westRecord.retired ?? []).map(\.number)
            done(
                .survey(
                    IntakeSurvey(
                        writesUnderWay: fault == .commitEarly ? 0 : writes, order: westOrder,
                        left: Set(
                            retired.filter { number in westCopies.allSatisfy { $0[CopyID(number)] == nil } }), at: 0)))
        case .flushVolumes:
            if fault != .skipFlushes { for file in westFiles { file.flush() } }
            done(.done)
        case .makePointFiles(let plan):
            westOrder += CopyRecord.orderStep
            for index in 0..<Self.volumes {
                westCopies[index][CopyID(plan.point.number)] = (
                    SimulatedFile(byteCount: Self.size), SimulatedBitmap(bits: Self.grains)
                )
            }
            done(.done)
        case .takePoint(let plan):
            for index in 0..<Self.volumes {
                addPoint(plan.point.number, to: west[index], index, resume: false)
                for point in plan.dropped { west[index].volume.withdrawCopy(CopyID(point.number)) }
                west[index].pump()
            }
            done(.done)
        case .forgetChanges:
            for simulated in west { simulated.volume.forgetChanges() }
            done(.done)
        case .markDifferences(let point, _): done(.bytes(markDifferences(from: point)))
        case .dropDifferences: done(.done)
        case .open(let point, _):
            takeOver(point, Array(repeating: true, count: Self.volumes), trusted: true)
            done(.done)
        case .stopMirroring, .startMirroring, .shutHostsOut, .admitHosts, .settleChanges, .keepUnsent,
            .serveAsSecondary,
            .askToYield, .takeChanges:
            done(.failed(SimulationFailure("\(action) is a primary's")))
        }
    }

    private func answer(_ ok: Bool) -> Answer { ok ? .done : .failed(SimulationFailure("the record cannot be saved")) }

    private func take(_ change: GroupChange) -> Bool {
        guard saveWest(try? westGroup.change(change)) else {
            note("west cannot record \(change)")
            return false
        }
        if case .committed(let plan) = change {
            note("point \(plan.point.number) is committed")
            figures.commits += 1
            for point in plan.dropped { remembered[point.number] = nil }
        }
        return true
    }

    /// Nothing of an earlier session is under way any more.
    private func awaitFence(_ life: Int, _ done: @escaping () -> Void) {
        guard life == westLife else { return }
        if fault == .skipFencing || west.allSatisfy({ $0.volume.modifyingInFlight == 0 }) { return done() }
        westTasks.append { [unowned self] in awaitFence(life, done) }
    }
}
