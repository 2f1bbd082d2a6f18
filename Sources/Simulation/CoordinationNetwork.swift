// CoordinationNetwork.swift: what is under way between the processes of the scenario `Coordination`: messages that are lost, late and repeated,
// and hosts' data, in sessions.

import Groups

struct CoordinationNetwork {
    private let mix: CoordinationMix
    private let fault: DeliberateFault?
    private var messages: [CoordinationMessage] = []
    private var data: [CoordinationData] = []
    private var nextSession = 1
    /// Pairs that cannot reach each other, until then.
    private var cuts: [Set<CoordinationProcess>: UInt64] = [:]
    /// Nothing is lost or late any more.
    var isQuiet = false
    var hasData: Bool { !data.isEmpty }

    init(_ mix: CoordinationMix, _ fault: DeliberateFault?) { (self.mix, self.fault) = (mix, fault) }

    // MARK: Messages

    mutating func cut(_ pair: Set<CoordinationProcess>, until end: UInt64) { cuts[pair] = end }
    mutating func mend() { cuts = [:] }

    func reaches(_ one: CoordinationProcess, _ other: CoordinationProcess, _ now: UInt64) -> Bool {
        cuts[[one, other]].map { $0 <= now } ?? true
    }

    mutating func post(
        _ from: CoordinationProcess, _ to: CoordinationProcess, _ body: CoordinationMessage.Body,
        _ now: UInt64, _ random: inout SeededGenerator
    ) {
        let sender = from == .stale ? .coordinator : from
        guard isQuiet || (reaches(sender, to, now) && !random.chance(mix.losing)) else { return }
        let message = CoordinationMessage(
            from: sender, to: to, body: body, isSlow: !isQuiet && random.chance(mix.slow))
        messages.append(message)
        if !isQuiet, random.chance(mix.repeating) { messages.append(message) }
        // Those that are under way for very long are lost.
        if messages.count > 200 { messages.removeFirst() }
    }

    /// One that arrives now.
    mutating func next(_ random: inout SeededGenerator) -> CoordinationMessage? {
        guard !messages.isEmpty else { return nil }
        let index = random.below(messages.count)
        if messages[index].isSlow, !isQuiet, !random.chance(3) { return nil }
        return messages.remove(at: index)
    }

    // MARK: Data

    mutating func send(
        _ host: Int, _ hosts: inout [CoordinationHost], _ remotes: inout [CoordinationRemote], _ now: UInt64,
        _ random: inout SeededGenerator
    ) {
        guard var sending = hosts[host].sending else { return }
        let remote = hosts[host].remote
        if sending.session == nil, hosts[host].outOfSync.isEmpty {
            // All of it is there already, and a remote that has prepared the point lets nobody in.
            hosts[host].sending = nil
            return hosts[host].tasks.append(.drained(sending.number))
        }
        guard reaches(.host(host), .remote(remote), now), remotes[remote].machine?.takesData == true else { return }
        guard let session = sending.session, remotes[remote].sessions[host] == session else {
            // A new session: what was sent in the one before does not count.
            remotes[remote].sessions[host] = nextSession
            (sending.session, sending.unsent, sending.unanswered) = (nextSession, hosts[host].outOfSync, [])
            nextSession += 1
            hosts[host].sending = sending
            return
        }
        if let grain = sending.unsent.min() {
            sending.unsent.remove(grain)
            sending.unanswered.insert(grain)
            data.append(
                CoordinationData(
                    host: host, session: session, grain: grain, content: hosts[host].image[grain],
                    isSlow: !isQuiet && random.chance(mix.slow)))
            hosts[host].sending = sending
        } else if sending.unanswered.isEmpty || fault == .drainEarly {
            hosts[host].sending = nil
            if fault != .drainUnflushed { remotes[remote].flushed[host] = remotes[remote].secondary[host] }
            hosts[host].outOfSync = []
            hosts[host].tasks.append(.drained(sending.number))
        }
    }

    mutating func arrive(
        _ hosts: inout [CoordinationHost], _ remotes: inout [CoordinationRemote], _ now: UInt64,
        _ random: inout SeededGenerator
    ) {
        let index = random.below(data.count)
        if data[index].isSlow, !isQuiet, !random.chance(3) { return }
        let write = data.remove(at: index)
        let remote = hosts[write.host].remote
        let isCurrent = hosts[write.host].sending?.session == write.session
        let isLetIn =
            remotes[remote].machine?.takesData == true && remotes[remote].sessions[write.host] == write.session
        guard isLetIn || (fault == .takeLateData && remotes[remote].machine != nil) else {
            if isCurrent { hosts[write.host].sending?.session = nil }
            return
        }
        remotes[remote].secondary[write.host]![write.grain] = write.content
        guard isCurrent else { return }
        if reaches(.host(write.host), .remote(remote), now) {
            hosts[write.host].sending?.unanswered.remove(write.grain)
        } else {
            hosts[write.host].sending?.session = nil  // its answer is lost
        }
    }
}
