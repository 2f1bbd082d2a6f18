// CopyTranscript.swift: operations on FlashCopies as text: what they are told, a line each, then what they ask for.
//
// `volumes a,b` begins anew; `table` says what is written down of a volume; an operation's name begins it. `ok` carries a change out that
// was asked for. See `checkTranscript`.

import FlashCopies
import Groups
import Testing
import Volumes

@Test("what operations on copies ask for")
func copyTranscripts() throws {
    var transcript = CopyTranscript()
    try checkTranscript("copies") { try transcript.answer($0) }
}

extension CopyTable {
    /// "c 1 active, d 2 creating (set s)".
    fileprivate var words: String {
        var parts = copies.map { copy in
            let kinds =
                [
                    copy.isFilled ? "filled" : nil, copy.isComplete ? "complete" : nil,
                    copy.isDurable ? "durable" : nil,
                    copy.isWritable ? "writable" : nil, copy.targetIsZero ? nil : "not zero",
                ].compactMap { $0 } + (copy.targetOwner == copy.id ? [] : ["target of \(copy.targetOwner.label)"])
            return
                "\(copy.name) \(copy.id.label) \(copy.state)\(kinds.isEmpty ? "" : " (\(kinds.joined(separator: ", ")))")"
        }
        if let restoring {
            parts.append("\(restoring.decided ? "is" : "may be") restored from \(restoring.copy.label)")
        }
        return parts.isEmpty ? "no copies" : parts.joined(separator: ", ")
    }
}

extension CopyID {
    fileprivate var label: Int64 { self >= CopyTable.firstID ? self - CopyTable.firstID : self }
}

/// Operations on FlashCopies of the volumes a, b, …
struct CopyTranscript {
    private var names: [String] = []
    private var tables: [CopyTable] = []
    private var steps: ((CopyAnswer, [CopyTable]) -> CopyStep<String>)?
    private var asked: CopyAction?

    mutating func answer(_ line: Line) throws -> [String] {
        switch line.word {
        case "volumes":
            names = line.list("names")
            tables = names.map { _ in CopyTable() }
            return []
        case "table":
            let index = names.firstIndex(of: line.fields["of"] ?? "a")!
            tables[index] = table(line)
            return ["\(names[index]): \(tables[index].words)"]
        case "ok": return carryOut()
        case "fails": return goOn(.failed(TranscriptError(description: line.fields["reason"] ?? "broken")))
        case "chain":
            return goOn(
                .chain(
                    ChainLook(
                        isDurable: line.isSet("durable"), nextOrder: line.number("next") ?? 100,
                        points: line.list("points").compactMap { UInt64($0) }, count: Int(line.number("count") ?? 3),
                        copy: state(line.fields["copy"]), at: 7))
            )
        case "files": return goOn(.files(targetIsZero: !line.isSet("used")))
        case "entered":
            let missed = line.list("missed").compactMap { name in names.firstIndex(of: name) }
            let apart = line.isSet("apart") ? TranscriptError(description: "not at one instant") : nil
            return goOn(.entered(missed: Set(missed), apart: apart))
        case "taken":
            return goOn(.taken(Set(line.list("ids").compactMap { CopyID($0) }.map { $0 + CopyTable.firstID })))
        case "opened":
            let files: [String: LinkFiles] = ["whole": .whole, "failed": .failed, "damaged": .damaged]
            return goOn(.opened(line.list("files").map { files[$0]! }))
        case "kept": return goOn(.pointFailed(isKept: true))
        case "unkept": return goOn(.pointFailed(isKept: false))
        case "completions":
            let found = CopyTable.completions(tables, at: 7)
            for (index, change) in found { tables[index].apply(change) }
            return zip(names, tables).map { "\($0): \($1.words)" }
        default:
            steps = operation(line)
            return goOn(.begin)
        }
    }

    private func state(_ name: String?) -> FlashCopy.State? {
        switch name {
        case "active": .active
        case "refreshing": .refreshing
        case "withdrawing": .withdrawing
        case "failed": .failed
        default: nil
        }
    }

    /// `copies=c:1:active,d:2:creating` and, by number, `filled`, `durable`, `writable`, `owner=2:1`, `set=1:s`.
    private func table(_ line: Line) -> CopyTable {
        var table = CopyTable()
        for text in line.list("copies") {
            let parts = text.split(separator: ":").map(String.init)
            let number = Int64(parts[1])!
            var copy = CopyRecord(
                id: CopyTable.firstID + number, name: parts[0], createdAt: 1, order: UInt64(number) * 10,
                state: CopyRecord.State(rawValue: parts[2])!)
            copy.isFilled = line.list("filled").contains(parts[1])
            copy.isDurable = line.list("durable").contains(parts[1])
            copy.isWritable = line.list("writable").contains(parts[1])
            copy.set = line.map("set")?[parts[1]]
            if let owner = line.map("owner")?[parts[1]].flatMap(Int64.init) {
                copy.targetOwner = CopyTable.firstID + owner
            }
            table.copies.append(copy)
            table.nextCopy = number + 1
        }
        if let number = line.number("restoring") {
            table.restoring = CopyTable.Restoring(
                copy: CopyTable.firstID + Int64(number), decided: line.isSet("decided"), kept: nil, decision: "d")
        }
        return table
    }

    private func copies(_ line: Line) -> [CopyRecord] {
        tables.compactMap { table in table.copies.first { $0.name == line.fields["name"] } }
    }

    private func operation(_ line: Line) -> (CopyAnswer, [CopyTable]) -> CopyStep<String> {
        let found = copies(line)
        switch line.word {
        case "take", "clone", "compare":
            let drafts = names.enumerated().map { index, name in
                var draft = CopyDraft(volume: name, name: line.fields["as"] ?? "c")
                (draft.isFilled, draft.isDurable) = (line.isSet("filled"), line.isSet("durable"))
                draft.target = line.fields["target"]
                if line.word == "clone" {
                    let origin = found[index]
                    draft.origin = CopyDraft.Origin(
                        id: origin.id, name: origin.name, order: origin.order, isDurable: origin.isDurable)
                }
                return draft
            }
            return erased(TakeCopies(drafts, at: line.word == "compare" ? .nextPoint : .now)) {
                $0.map { "\($0.name) \($0.id.label)" }.joined(separator: ", ")
            }
        case "retake":
            return erased(RetakeCopies(found.map(\.id), name: line.fields["name"]!, volumes: names)) { _ in "" }
        case "restore":
            let drafts = names.map { CopyDraft(volume: $0, name: "before") }
            return erased(RestoreVolumes(found, keeping: drafts, decision: "d")) { _ in "" }
        case "withdraw": return erased(WithdrawCopies(found.map(\.id))) { _ in "" }
        case "complete": return erased(CompleteCopy(found[0].id)) { $0 ? "it is complete" : "it is not there any more" }
        case "left": return erased(ForgetCopy(found[0].id, of: 0, wasInChain: true)) { _ in "" }
        default:
            let points = line.list("points").compactMap { CopyID($0) }.map { number in
                ChainLink(
                    CopyRecord(id: number, name: "", createdAt: 1, order: UInt64(number), state: .active), .serves,
                    isPoint: true)
            }
            var start = VolumeStart(isTrusted: !line.isSet("untrusted"))
            (start.points, start.role, start.held) = (
                points, line.fields["role"].flatMap(Role.init), line.number("held")
            )
            (start.knowsNothing, start.hasYielded) = (line.isSet("unknown"), line.isSet("yielded"))
            if let point = line.fields["failover"] { start.failover = CopyID(point).map { .from($0) } ?? .lost }
            return erased(StartVolume(start)) { _ in "" }
        }
    }

    private func erased<Operation: CopySteps>(
        _ steps: Operation, _ words: @escaping (Operation.Outcome) -> String
    ) -> (CopyAnswer, [CopyTable]) -> CopyStep<String> {
        var steps = steps
        return { answer, tables in
            switch steps.next(after: answer, tables) {
            case .perform(let action): .perform(action)
            case .done(let outcome): .done(words(outcome))
            case .failed(let error): .failed(error)
            }
        }
    }

    private mutating func carryOut() -> [String] {
        guard case .change(let index, let change)? = asked else { return goOn(.done) }
        tables[index].apply(change)
        return ["\(names[index]): \(tables[index].words)"] + goOn(.done)
    }

    /// What has happened already is taken over at once.
    private mutating func goOn(_ answer: CopyAnswer) -> [String] {
        asked = nil
        switch steps?(answer, tables) {
        case .perform(.acknowledge(let index, let change)):
            tables[index].apply(change)
            return ["\(names[index]), whether it can be saved or not: \(tables[index].words)"] + goOn(.done)
        case .perform(let action):
            asked = action
            return [words(action)]
        case .done(let outcome): return ["done\(outcome.isEmpty ? "" : ": \(outcome)")"]
        case .failed(let error): return ["it has failed: \(error)"]
        case nil: return ["nothing is under way"]
        }
    }

    // MARK: Words

    private func words(_ action: CopyAction) -> String {
        func at(_ index: Int, _ text: String) -> String { "\(names[index]): \(text)" }
        return switch action {
        case .look(let index, let id): at(index, "look\(id.map { " at \($0.label)" } ?? "")")
        case .change(let index, let change): at(index, "save: \(words(change))")
        case .acknowledge(let index, let change): at(index, words(change))
        case .save(let index): at(index, "save")
        case .onceSaved(let aftermath): "once all is saved: \(words(aftermath))"
        case .makeFiles(let index, let copy, let owner):
            at(
                index,
                "make the files of \(copy.name) \(copy.id.label) at \(copy.order)\(copy.isDurable ? ", durable" : "")\(owner.map { " over the target of \($0.label)" } ?? "")"
            )
        case .discardFiles(let index, let id, let target):
            at(index, "discard the bitmap of \(id.label)\(target.map { " and target \($0.label)" } ?? "")")
        case .removeFiles(let index, let id, let target):
            at(index, "remove the bitmap of \(id.label)\(target.map { " and target \($0.label)" } ?? "")")
        case .flush(let index): at(index, "flush")
        case .flushChanges(let index): at(index, "flush what older copies have noted")
        case .flushTarget(let index, let id): at(index, "flush the target of \(id.label)")
        case .flushBitmap(let index, let id): at(index, "flush the bitmap of \(id.label)")
        case .enter(let entries): "at one instant, \(words(entries))"
        case .enterWithPoint(let entries): "with the next point, \(words(entries))"
        case .leave(let index, let id): at(index, "\(id.label) leaves")
        case .awaitGone(let places):
            "wait until \(places.map { at($0.volume, "\($0.id.label)") }.joined(separator: ", ")) are gone"
        case .takeOutOfUse(let index, let id): at(index, "take \(id.label) out of use")
        case .endReaders(let index, let id): at(index, "end the readers of \(id.label)")
        case .findTaken(let ids): "find which of \(ids.map { "\($0.label)" }.joined(separator: ", ")) have begun"
        case .openFiles(let links): "open the files of \(links.map { "\($0.id.label)" }.joined(separator: ", "))"
        case .failPoint(let id): "save: point \(id.label) has failed"
        case .loseFiles(let ids):
            "remove the bitmaps of \(ids.map(\.label).sorted().map(String.init).joined(separator: ", "))"
        case .resume(let link): "\(link.id.label) takes its place, and \(link.resumption)"
        case .takeRole(let role): words(role)
        case .resumeRestore(let id): "what has not come back yet comes back from \(id.label)"
        case .loseFailover: "save: what was failed over to is lost"
        case .forgetRestore: "save: nothing is restored"
        case .confirm: "flush, and save: it is this run's"
        case .finishResuming: "let hosts and work in the background in"
        case .shutHostsOut(let index): at(index, "shut hosts out")
        case .admitHosts(let index): at(index, "admit hosts")
        case .makeRestoreBitmap(let index): at(index, "make the bitmap of what is to be restored")
        case .beginRestore(let index, let id): at(index, "hosts see \(id.label)")
        case .flushRestoreBitmap(let index): at(index, "flush the bitmap of what is to be restored")
        case .goOnRestoring(let index): at(index, "data flows back")
        case .dropRestore(let index): at(index, "hosts see the volume again, and the bitmap goes")
        }
    }

    private func words(_ role: RoleStart) -> String {
        let name = role.role.map { "a \($0)'s" } ?? "its own"
        return "the engine is \(name)"
            + (role.marksAll ? ", and everything counts as changed" : "")
            + (role.marksRegions ? ", and what was active counts as changed" : "")
            + (role.held.map { ", and point \($0) goes on" } ?? "")
    }

    private func words(_ aftermath: Aftermath) -> String {
        var (aftermath, found) = (aftermath, [String]())
        while case .perform(let action) = aftermath.next(after: .done, tables) { found.append(words(action)) }
        return found.joined(separator: "; ")
    }

    private func words(_ entries: [CopyEntry]) -> String {
        entries.map { entry in
            let place =
                switch entry.place {
                case .newest: "as the newest"
                case .below(let id): "below \(id.label)"
                case .insteadOf(let id): "instead of \(id.label)"
                }
            return "\(names[entry.volume]): \(entry.copy.id.label) \(place)"
        }.joined(separator: ", ")
    }

    private func words(_ change: CopyChange) -> String {
        switch change {
        case .added(let copy): "\(copy.name) \(copy.id.label) is added"
        case .removed(let id): "\(id.label) is removed"
        case .active(let id): "\(id.label) is active"
        case .refreshing(let id): "\(id.label) is refreshing"
        case .withdrawing(let id, let alone): "\(id.label) is withdrawing\(alone ? ", alone" : "")"
        case .failed(let id, let reason): "\(id.label) has failed: \(reason)"
        case .complete(let id): "\(id.label) is complete"
        case .set(let id, _, _): "\(id.label) is set"
        case .replaced(let old, let new, let reason):
            "\(new.label) replaces \(old.label)\(reason.map { ": \($0)" } ?? "")"
        case .left(let id): "\(id.label) has left"
        case .forgotten(let ids): "\(ids.map(\.label).sorted().map(String.init).joined(separator: ", ")) are forgotten"
        case .lost(let ids, _): "\(ids.map(\.label).sorted().map(String.init).joined(separator: ", ")) are lost"
        case .resumed: "what the restart has made of the copies"
        case .restoring(let restoring): restoring == nil ? "nothing is restored" : "it is to be restored"
        case .restoreDecided: "it is restored"
        }
    }
}
