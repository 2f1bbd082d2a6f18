// Transcript.swift: a machine's answers as text that an operator can read: an input a line, then, indented, all that it says.
//
// `record`, `mirror`, `change` and the cycle's events; a line that begins with `!` is one whose save fails. With TRANSCRIPTS=write in the
// environment the files are written anew, to be read before they are committed.

import FoundationEssentials
import Groups

/// A word, and what is said about it: `opened lineage=L committed=3`.
struct Line {
    var word: String
    var fields: [String: String] = [:]
    var saveFails = false

    init(_ text: Substring) {
        var text = text
        if text.hasPrefix("! ") {
            saveFails = true
            text = text.dropFirst(2)
        }
        let parts = text.split(separator: " ").map(String.init)
        word = parts.first ?? ""
        for part in parts.dropFirst() {
            let sides = part.split(separator: "=", maxSplits: 1).map(String.init)
            fields[sides[0]] = sides.count > 1 ? sides[1] : "yes"
        }
    }

    func number(_ name: String) -> UInt64? { fields[name].flatMap { UInt64($0) } }
    func required(_ name: String) -> UInt64 { number(name) ?? 0 }
    func list(_ name: String) -> [String] { fields[name]?.split(separator: ",").map(String.init) ?? [] }
    func isSet(_ name: String) -> Bool { fields[name] == "yes" }
    func map(_ name: String) -> [String: String]? {
        fields[name] == nil
            ? nil
            : Dictionary(
                uniqueKeysWithValues: list(name).map { pair in
                    let sides = pair.split(separator: ":").map(String.init)
                    return (sides[0], sides.count > 1 ? sides[1] : "")
                })
    }
}

func point(_ number: UInt64) -> PointRecord { PointRecord(number: number, formedAt: 1) }

extension GroupRecord {
    /// `role`, `lineage`, `counted`, `committed`, `held`, `forming`, `points`, `failed`, `generations` …; made as a file of that content.
    init(_ line: Line) throws {
        var json: [String] = [#""format": 2"#]
        let role = line.fields["role"] ?? "primary"
        json.append(#""role": "\#(role)""#)
        json.append(
            #""generations": [\#((line.fields["generations"] == nil ? ["one"] : line.list("generations")).map { "\"\($0)\"" }.joined(separator: ","))]"#
        )
        json.append(#""lastNumber": \#(line.number("counted") ?? 0)"#)
        json.append(#""suspendedByOperator": \#(line.isSet("suspended"))"#)
        // `4` has files of every volume, `4:a+b` of these, `4:` of none.
        func pointText(_ text: String, failed: Bool = false) -> String {
            let sides = text.split(separator: ":", omittingEmptySubsequences: false)
            let names = sides.count > 1 ? sides[1].split(separator: "+").map { "\"\($0)\"" } : nil
            let changed = names.map { #", "changed": [\#($0.joined(separator: ","))]"# } ?? ""
            return #"{"number": \#(sides[0]), "formedAt": 1\#(failed ? #", "isFailed": true"# : "")\#(changed)}"#
        }
        let failed = line.list("failed")
        json.append(
            #""points": [\#(line.list("points").map { pointText($0, failed: failed.contains($0)) }.joined(separator: ","))]"#
        )
        if line.fields["retired"] != nil {
            json.append(#""retired": [\#(line.list("retired").map { pointText($0) }.joined(separator: ","))]"#)
        }
        for (field, name) in [("lineage", "lineage"), ("peer", "peerSite")] {
            if let text = line.fields[field] { json.append(#""\#(name)": "\#(text)""#) }
        }
        if let number = line.fields["committed"] { json.append(#""lastCommitted": \#(pointText(number))"#) }
        if let number = line.fields["held"] { json.append(#""held": \#(pointText(number))"#) }
        for name in ["forming", "handingOver", "yielded", "rate"] {
            if let number = line.fields[name] { json.append(#""\#(name)": \#(number)"#) }
        }
        for name in ["alone", "failingBack", "fromImage"] where line.isSet(name) { json.append(#""\#(name)": true"#) }
        if let kind = line.fields["conflict"] { json.append(#""conflict": {"kind": "\#(kind)", "at": 3}"#) }
        if let number = line.fields["failedOver"] {
            let volumes = line.list("restoring").map { "\"\($0)\"" }.joined(separator: ",")
            json.append(#""failedOver": {"point": \#(number), "at": 3, "restoring": [\#(volumes)]}"#)
        }
        if let map = line.map("lineages") {
            let pairs = map.sorted { $0.key < $1.key }.map { #""\#($0.key)": "\#($0.value)""# }
            json.append(#""volumeLineages": {\#(pairs.joined(separator: ","))}"#)
        }
        self = try JSONDecoder().decode(GroupRecord.self, from: Data("{\(json.joined(separator: ", "))}".utf8))
    }

    init(_ text: String) throws { try self.init(Line(Substring("record \(text)"))) }

    /// What it says, but for times.
    var words: String {
        var parts = [phase.kind.rawValue]
        if !generations.isEmpty { parts.append("generations \(generations.joined(separator: ","))") }
        if let peerSite { parts.append("of peer \(peerSite)") }
        if let lineage { parts.append("copy \(lineage)") }
        if let volumeLineages {
            parts.append(
                "copies \(volumeLineages.sorted { $0.key < $1.key }.map { "\($0.key):\($0.value)" }.joined(separator: ","))"
            )
        }
        if lastNumber > 0 { parts.append("counted to \(lastNumber)") }
        if let lastCommitted { parts.append("committed \(lastCommitted.number)") }
        if let forming { parts.append("forming \(forming)") }
        if let held { parts.append("holds \(held.number)") }
        if let handingOver { parts.append("hands over \(handingOver)") }
        if let failedOver {
            parts.append("failed over to \(failedOver.point), restoring \(failedOver.restoring.joined(separator: ","))")
            if failedOver.joins == true { parts.append("joins") }
        }
        if let yielded { parts.append("yielded \(yielded)") }
        if !points.isEmpty {
            parts.append(
                "points \(points.map { "\($0.number)\($0.isFailed == true ? " (failed)" : $0.isBase == true ? " (base)" : "")\($0.filed)" }.joined(separator: ", "))"
            )
        }
        if let retired, !retired.isEmpty {
            parts.append("retired \(retired.map { "\($0.number)\($0.filed)" }.joined(separator: ", "))")
        }
        if let untracked {
            parts.append(
                "untracked \(untracked.sorted { $0.key < $1.key }.map { "\($0.key) in session \($0.value)" }.joined(separator: ", "))"
            )
        }
        if let joinedAfter {
            parts.append(
                "joined \(joinedAfter.sorted { $0.key < $1.key }.map { "\($0.key) after \($0.value)" }.joined(separator: ", "))"
            )
        }
        if let leftOut { parts.append("left out \(leftOut.joined(separator: ","))") }
        if let rate { parts.append("rate \(rate)") }
        if let conflict { parts.append(conflict.kind.rawValue) }
        if isAlone { parts.append("alone") }
        if isFailingBack { parts.append("failing back") }
        if primary?.fromImage == true { parts.append("seeded") }
        if suspendedByOperator { parts.append("suspended") }
        return parts.joined(separator: "; ")
    }
}

extension Cycle.Action {
    var words: String {
        switch self {
        case .openSession: "open a session"
        case .closeLink: "close the link"
        case .prepare(let number): "prepare point \(number)"
        case .form(let number): "form point \(number)"
        case .rewind: "begin the drain anew"
        case .move(.read(let slot, let volume)): "read volume \(volume) into slot \(slot)"
        case .move(.send(let slot, _, let offset, let length, let urgent)):
            "send \(length) bytes at \(offset) from slot \(slot)\(urgent ? " at once" : "")"
        case .move(.hurry(let volume)): "hurry volume \(volume)"
        case .move(.flush(let volumes)): "flush volume \(volumes.map(String.init).joined(separator: ", ")) at the peer"
        case .move(.clear(let runs)):
            "clear \(runs.map { "\($0.grains) of volume \($0.volume)" }.joined(separator: ", "))"
        case .commit(let number, let previous, _): "commit point \(number) after \(previous.map(String.init) ?? "none")"
        case .endPoint(let number): "end point \(number)"
        case .giveUp: "give the point up"
        case .survey: "ask how the hosts stand"
        case .askHost(let host, let message): "ask host \(host): \(message.request.body)"
        case .askRemote(let remote, let message): "ask remote \(remote): \(message.request.body)"
        case .answer(let answer): "answer: \(answer.body)"
        case .holdAndForm(let number): "hold, and form point \(number)"
        case .letGo: "let go"
        case .contradicted(let words): "tell: \(words)"
        case .markAllChanged(let names): "mark all of \(names?.joined(separator: ", ") ?? "every volume")"
        }
    }
}

extension SiteAction {
    var words: String {
        switch self {
        case .settle: "settle the record"
        case .change(let change): "save: \(change.name)"
        case .fence(let next): next == 0 ? "close the intake" : "fence the intake; only session \(next) is let in"
        case .survey: "survey the volumes"
        case .flushVolumes(let names): names.isEmpty ? "flush nothing" : "flush \(names.joined(separator: ", "))"
        case .makePointFiles(let plan): "make the files of point \(plan.point.number)\(plan.point.filed)"
        case .takePoint(let plan):
            "take point \(plan.point.number) into the chains\(plan.dropped.isEmpty ? "" : ", and out of them \(plan.dropped.map { String($0.number) }.joined(separator: ", "))")"
        case .dropPointFiles(let number): "drop the files of point \(number)"
        case .forgetChanges: "forget what was changed as primary"
        case .markDifferences(let point, let volumes):
            "mark what must come back from point \(point) in \(volumes.joined(separator: ", "))"
        case .dropDifferences: "drop these marks"
        case .open(let point, let volumes): "open \(volumes.joined(separator: ", ")) at point \(point)"
        case .formPoint: "form a point, and let the peer commit it"
        case .meet(let place): "meet the other pairs at place \(place)"
        case .quiet: "let no point begin"
        case .holdCopies: "let nothing begin on FlashCopies"
        case .countChanges: "count what the peer lacks"
        case .askToPromote(let point): "ask the peer to take over at point \(point)"
        case .endPeersSessions: "end what was asked of the peer"
        case .stopMirroring: "stop mirroring"
        case .startMirroring: "start mirroring, if the record says so"
        case .shutHostsOut: "shut hosts out"
        case .admitHosts: "admit hosts"
        case .settleChanges: "give up the point in the volumes, and flush what has changed"
        case .keepUnsent: "keep as a FlashCopy what the peer lacks"
        case .dropUnsent: "drop that FlashCopy"
        case .serveAsSecondary: "serve as secondary"
        case .askToYield: "ask the peer to yield"
        case .takeChanges: "take over what the peer has changed"
        case .copyAtPoint: "take FlashCopies in the instant of a point"
        case .pinPoint(let point): "have the peer keep point \(point)"
        case .comparePoint(let point): "compare point \(point)"
        case .dropCopies: "drop the FlashCopies"
        case .unpinPoint(let point): "have the peer let go of point \(point)"
        }
    }
}

/// A group, and what it answers.
struct GroupTranscript {
    private var group = Group(record: .first(.primary, identity: "one"))
    private var now: UInt64 = 0
    private var shown: String?
    /// An operation that is under way, and what it has asked for.
    private var steps: ((Answer, GroupRecord) -> Next<String>)?
    private var asked: SiteAction?

    mutating func answer(_ line: Line) throws -> [String] {
        now += 1
        switch line.word {
        case "record":
            group = Group(record: try GroupRecord(line))
            shown = nil
            return []
        case "mirror":
            let interval: Interval = line.isSet("manual") ? .manual : .continuous
            return carryOut(
                group.begin(
                    Cycle.Settings(
                        interval: interval, volumes: Int(line.number("volumes") ?? 1), window: 2, checkpointBytes: 100),
                    now: now),
                line)
        case "commit", "prepare", "session", "failover", "yield", "join", "handover", "takeback", "verify":
            steps = operation(line)
            return goOn(.begin)
        case "ok":
            guard case .change(let change)? = asked else { return goOn(.done) }
            do { _ = try group.change(change) } catch { return ["refused: \(error)"] }
            group.wasSaved()
            return ["record: \(group.record.words)"] + goOn(.done)
        case "fails": return goOn(.failed(TranscriptError(description: line.fields["reason"] ?? "broken")))
        case "survey":
            return goOn(
                .survey(
                    IntakeSurvey(
                        writesUnderWay: Int(line.number("writes") ?? 0), order: line.number("order") ?? 100,
                        changed: line.fields["changed"] == nil
                            ? ["a", "b"] : line.list("changed").filter { $0 != "none" },
                        retired: line.retired, at: 7)))
        case "declines": return goOn(.failed(PeerRefusal("no")))
        case "formed-point": return goOn(.point(point(line.required("point"))))
        case "bytes": return goOn(.bytes(line.required("count")))
        case "yielded":
            return goOn(
                .yielded(
                    Joining(
                        peer: "west", lineage: "new", volumeLineages: ["a": "new"], point: point(line.required("point"))
                    )))
        case "end":
            group.end()
            return []
        case "settle": return carryOut(group.settle(), line, ofCycle: false)
        case "change":
            do { return carryOut(try group.change(try change(line)), line, ofCycle: false) } catch {
                return ["refused: \(error)"]
            }
        case "later":
            guard let wake = group.wakeAt else { return ["nothing is due"] }
            now = max(now, wake)
            return carryOut(group.handle(.tick, now: now), line)
        case "wait":
            now += line.required("seconds") * 1_000_000_000
            return carryOut(group.handle(.tick, now: now), line)
        default: return carryOut(group.handle(try event(line), now: now), line)
        }
    }

    private mutating func goOn(_ answer: Answer) -> [String] {
        asked = nil
        switch steps?(answer, group.record) {
        case .perform(let action):
            asked = action
            return [action.words]
        case .done(let outcome): return ["done\(outcome.isEmpty ? "" : ": \(outcome)")"]
        case .failed(let error): return ["it has failed: \(error)"]
        case nil: return ["nothing is under way"]
        }
    }

    private func operation(_ line: Line) -> (Answer, GroupRecord) -> Next<String> {
        switch line.word {
        case "commit":
            return erased(
                RemoteCommit(
                    number: line.required("point"), after: line.number("after"), formedAt: 1, keep: Retention(last: 2),
                    session: line.number("session") ?? 1)
            ) { "point \($0.number)" }
        case "prepare":
            let request = RemoteRequest.prepare(line.required("point"), after: line.number("after") ?? 0)
            let copy = CopyIdentity(lineage: line.fields["copy"], volumes: line.map("copies"))
            return erased(
                RemotePart(
                    .request(Stamped(epoch: 1, request), formedAt: 1, places: nil, copy: copy), keep: Retention(last: 2)
                )
            ) { $0.answer.map { "\($0.body)" } ?? "nothing" }
        case "session":
            return erased(IntakeSession(site: "east", generations: ["one"], session: line.required("number"))) {
                "\($0)"
            }
        case "failover":
            return erased(
                Failover(
                    Takeover(
                        point: line.required("point"), volumes: ["a", "b"], generation: "two", at: 3, joins: false))
            ) { "\($0) bytes are not part of it" }
        case "yield":
            return erased(
                Yield(
                    to: "west", generations: ["two", "one"], highestPoint: line.required("highest"), lineage: "new",
                    volumes: ["a"], keep: Retention(last: 2), servesHosts: line.isSet("serves"))
            ) { "point \($0.number)" }
        case "handover": return erased(HandOver(seconds: 60)) { "at point \($0.number)" }
        case "takeback": return erased(TakeBack()) { _ in "" }
        case "verify": return erased(Verify()) { "point \($0.number)" }
        default:
            let theirs = try! GroupRecord(
                "role=\(line.isSet("primary") ? "primary" : "secondary") generations=\(line.fields["knows"] ?? "one")")
            return erased(
                Join(
                    group.record,
                    Standing(site: "west", siteID: "west", record: theirs, wrote: false, changedBytes: 0),
                    identity: "two")
            ) { _ in "" }
        }
    }

    private func erased<Operation: Steps>(
        _ steps: Operation, _ words: @escaping (Operation.Outcome) -> String
    ) -> (Answer, GroupRecord) -> Next<String> {
        var steps = steps
        return { answer, record in
            switch steps.next(after: answer, record) {
            case .perform(let action): .perform(action)
            case .done(let outcome): .done(words(outcome))
            case .failed(let error): .failed(error)
            }
        }
    }

    private mutating func carryOut(_ turn: Turn<Cycle.Action>, _ line: Line, ofCycle: Bool = true) -> [String] {
        var answers = turn.before.map(\.words)
        if turn.saves {
            if line.saveFails {
                answers.append("save fails: \(group.record.words)")
                let next = group.saveFailed("no space", ofCycle: ofCycle, now: now)
                if !ofCycle { answers.append("counts: \(group.record.words)") }
                return answers + carryOut(next, line)
            }
            answers.append("save: \(group.record.words)")
            group.wasSaved()
        }
        answers += turn.after.map { "then \($0.words)" }
        guard let cycle = group.cycle else { return answers }
        let state = "\(group.shownState.rawValue)\(cycle.suspension.map { ": \($0)" } ?? "")"
        if state != shown { answers.append("shown as \(state)") }
        shown = state
        return answers
    }

    private func event(_ line: Line) throws -> Cycle.Event {
        let reason = line.fields["reason"] ?? "cut"
        switch line.word {
        case "opened":
            return .sessionOpened(
                PeerState(
                    session: 1, site: "west", lineage: line.fields["lineage"] ?? "L",
                    volumeLineages: line.map("lineages"),
                    committed: line.number("committed").map(point)))
        case "refused": return .sessionFailed(reason, retry: line.isSet("retry"))
        case "lost": return .linkLost(reason)
        case "marked": return .allMarked
        case "prepared": return .prepared(changed: line.isSet("changed"))
        case "unready": return .notReady
        case "formed":
            let volumes = Array(0..<(group.cycle?.settings.volumes ?? 1))
            return .formed(
                at: 5, intact: !line.isSet("broken"),
                changed: line.fields["changed"] == nil ? volumes : line.list("changed").compactMap { Int($0) })
        case "read":
            let grains = line.number("grain").map { Int($0)..<Int($0) + 1 }
            return .move(
                .read(slot: Int(line.required("slot")), grains: grains, offset: 0, length: grains == nil ? 0 : 100))
        case "sent": return .move(.sent(slot: Int(line.required("slot")), wire: 100))
        case "flushed": return .move(.flushed)
        case "committed": return .committed(at: 6)
        case "declined": return .commitRefused(reason)
        case "pointlost": return .pointLost(reason, number: line.number("number"))
        case "gaveup": return .gaveUp
        case "suspend": return .suspend
        case "resume": return .resume
        case "request": return .request
        case "tick": return .tick
        default: throw TranscriptError(description: "'\(line.word)' is no event")
        }
    }

    private func change(_ line: Line) throws -> GroupChange {
        let name = line.fields.keys.first { line.fields[$0] == "yes" } ?? ""
        guard let change = samples(line)[name] else { throw TranscriptError(description: "'\(name)' is no change") }
        return change
    }
}

extension PointRecord {
    fileprivate var filed: String {
        changed.map { $0.isEmpty ? " (of nothing)" : " (of \($0.joined(separator: "+")))" } ?? ""
    }
}

extension Line {
    /// Points, each with the volumes that have files of it: `left=3:a+b,4:`.
    fileprivate var retired: [UInt64: [String]] {
        (map("left") ?? [:]).reduce(into: [:]) { found, entry in
            found[UInt64(entry.key)!] = entry.value.split(separator: "+").map(String.init)
        }
    }
}

struct TranscriptError: Error, CustomStringConvertible {
    var description: String
}

/// Every change, by its name, with what the line says of it.
func samples(_ line: Line) -> [String: GroupChange] {
    let number = line.number("point") ?? 9
    let volume = line.fields["volume"] ?? "a"
    let plan = CommitPlan(
        point: point(number), dropped: line.list("dropped").compactMap { UInt64($0) }.map(point),
        retired: line.retired)
    return [
        "paired": .paired(site: "west", generations: ["one"]),
        "yieldIsKnown": .yieldIsKnown,
        "committed": .committed(plan),
        "sentAnew": .sentAnew(session: line.number("session") ?? 2),
        "failedOver": .failedOver(
            Takeover(
                point: number, volumes: ["a", "b"], leftOut: line.list("leftOut"), generation: "two", at: 3,
                joins: line.fields["joins"] == "true")),
        "alone": .alone,
        "conflict": .conflict(line.fields["kind"] == "none" ? nil : Phase.Conflict(kind: .stale, at: 3)),
        "pointGivenUp": .pointGivenUp,
        "generationBegun": .generationBegun("two"),
        "handingOver": .handingOver(point: number),
        "handoverTakenBack": .handoverTakenBack,
        "failingBack": .failingBack(line.fields["on"] != "false"),
        "seeded": .seeded,
        "yielded": .yielded(
            Yielding(
                point: PointRecord(number: number, formedAt: 5, order: 4, isBase: true), peer: "west",
                generations: ["two", "one"], lineage: "new", volumes: ["a"],
                dropped: line.list("dropped").compactMap { UInt64($0) }.map(point))),
        "joined": .joined(Joining(peer: "west", lineage: "new", volumeLineages: ["a": "new"], point: point(number))),
        "restored": .restored(volume: volume),
        "untracked": .untracked(volume: volume, lineage: "lost", session: line.number("session") ?? 1),
        "rate": .rate(line.number("bytes") ?? 1000),
        "retired": .retired(line.list("points").compactMap { UInt64($0) }),
        "pointFailed": .pointFailed(number, volume: volume),
        "started": .started(
            Membership(
                volumes: ["a", "b"], foreign: line.map("foreign") ?? [:], exchanged: Set(line.list("exchanged")),
                lineage: "anew")),
        "pointsVoided": .pointsVoided(through: number, lineage: "anew"),
    ]
}
