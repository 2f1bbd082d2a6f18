// SeveralConversations.swift: what the coordinator of the scenario `SeveralHosts` asks of the others, as `Conversations` and `CoordinationPeers`
// do: each question a call of its own, one to each at a time, and remotes are known once hosts have said where they are.

import Groups

final class SeveralConversations {
    private unowned let host: SeveralHost
    private var world: SeveralHosts { host.world }

    /// A question that is under way; cancelled, nobody hears its answer.
    private final class Call {
        let since: UInt64
        var isCancelled = false
        init(since: UInt64) { self.since = since }
    }
    private var hosts: [Int: (question: HostRequest, call: Call)] = [:]
    private var remotes: [Int: (question: RemoteRequest, call: Call)] = [:]
    private var surveys: Call?
    /// Hosts that have said which remote is theirs.
    private var located: Set<Int>
    private static let patience: UInt64 = 1_000_000_000

    init(_ host: SeveralHost, _ places: [PairPlace]) {
        self.host = host
        located = Set(
            SeveralHosts.members.filter { index in places.contains { $0.host == "host \(index)" } } + [host.index])
    }

    func end() {
        for index in SeveralHosts.members {
            hosts[index]?.call.isCancelled = true
            remotes[index]?.call.isCancelled = true
        }
        surveys?.isCancelled = true
        (hosts, remotes, surveys) = ([:], [:], nil)
    }

    private var places: [PairPlace]? {
        guard located.count == SeveralHosts.members.count else { return nil }
        return SeveralHosts.members.map { PairPlace(host: "host \($0)", remote: "remote \($0)") }
    }

    // MARK: How hosts stand

    func survey(own: Survey) {
        surveys?.isCancelled = true
        let call = Call(since: world.now)
        surveys = call
        let others = SeveralHosts.members.filter { $0 != host.index }
        var (left, all, problems) = (others.count, Survey(changed: false, problem: nil, highest: 0), [String]())
        for other in others {
            let asked = world.hosts[other]
            world.call(host, asked) {
                asked.surveyed($0)
            } done: { [unowned self] (survey: Survey?) in
                if survey != nil { located.insert(other) }
                if let problem = survey == nil ? "it cannot be reached" : survey?.problem {
                    problems.append("'\(asked.name)': \(problem)")
                }
                all.changed = all.changed || survey?.changed == true
                all.highest = max(all.highest, survey?.highest ?? 0)
                left -= 1
                guard left == 0 else { return }
                all.problem = problems.isEmpty ? nil : problems.sorted().joined(separator: "; ")
                learn(own, all, call)
            }
        }
    }

    /// Where the pairs are is written down before it is relied on.
    private func learn(_ own: Survey, _ others: Survey, _ call: Call) {
        var all = Survey(
            changed: own.changed || others.changed, problem: own.problem ?? others.problem,
            highest: max(own.highest, others.highest))
        if host.fault == .askBlindly { all.problem = nil }
        // The process may end in the middle of it.
        host.inbox.append { [self, unowned host] in
            let process = host.life
            if others.problem == nil, let places, host.record.coordination?.places != places {
                _ = host.take(.places(places))
            }
            guard process == host.life else { return }
            let all = all
            host.inbox.append { if !call.isCancelled { host.event(.surveyed(all), 0) } }
        }
    }

    private func locate() {
        for other in SeveralHosts.members where other != host.index {
            let asked = world.hosts[other]
            world.call(host, asked) {
                asked.surveyed($0)
            } done: { [unowned self] (survey: Survey?) in
                if survey != nil { located.insert(other) }
            }
        }
    }

    // MARK: Questions

    func ask(host index: Int, _ message: HostMessage) {
        if let (question, call) = hosts[index] {
            if question == message.request.body, world.now - call.since < Self.patience { return }
            call.isCancelled = true
        }
        let call = Call(since: world.now)
        hosts[index] = (message.request.body, call)
        ask(index, message, waits: false, call)
    }

    /// Who drains is asked again as soon as it has answered.
    private func ask(_ index: Int, _ message: HostMessage, waits: Bool, _ call: Call) {
        let asked = world.hosts[index]
        world.call(host, asked) {
            asked.asked(message, waits: waits, $0)
        } done: { [unowned self] (answer: Stamped<HostAnswer>?) in
            guard !call.isCancelled else { return }
            if let answer {
                if case .superseded(let epoch) = answer.body, epoch <= message.request.epoch {
                    world.fail("a coordinator hears that it is followed by itself, or one before it")
                }
                host.inbox.append { [unowned self] in host.event(.host(index, answer), 0) }
                if case .ran = answer.body { return ask(index, message, waits: true, call) }
            }
            host.inbox.append { [unowned self] in hosts[index] = nil }
        }
    }

    func ask(remote index: Int, _ message: RemoteMessage) {
        if let (question, call) = remotes[index] {
            if question == message.request.body, world.now - call.since < Self.patience { return }
            call.isCancelled = true
        }
        let call = Call(since: world.now)
        remotes[index] = (message.request.body, call)
        ask(index, message) { [unowned self] reply in
            guard !call.isCancelled else { return }
            if let reply, let answer = reply.answer {
                host.inbox.append { [unowned self] in host.event(.remote(index, answer, at: reply.at), 0) }
            }
            host.inbox.append { [unowned self] in remotes[index] = nil }
        }
    }

    private func ask(_ index: Int, _ message: RemoteMessage, done: @escaping (RemoteReply?) -> Void) {
        guard let places else {
            // Who takes up may have to ask remotes before it has asked any host.
            locate()
            return world.later { done(nil) }
        }
        let (world, asked, through) = (world, world.remotes[index], world.hosts[index])
        let serve: (@escaping (RemoteReply?) -> Void) -> Void = { asked.asked(message, places, $0) }
        guard world.mix.asksThroughHosts, through !== host else { return world.call(host, asked, serve, done: done) }
        world.call(host, through) { answer in
            world.call(through, asked, serve, done: answer)
        } done: {
            done($0)
        }
    }
}
