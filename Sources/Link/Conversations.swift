// Conversations.swift: what the coordinator of a group with several hosts asks of the others, each question a call of its own.
//
// Must be prevented:
//   calls pile up at somebody who does not answer: one is under way to each, and a newer question takes its place
//   an answer is waited for a moment longer because somebody asks only now and then: who drains is asked again as soon as it has answered

import Base
import Groups
import Ring

/// How the other sites of a group are asked. Indices are the coordinator's, of hosts and of their remotes.
package protocol CoordinationClient: Sendable {
    /// How all other hosts stand, together.
    func survey() async -> Survey
    /// Whether points are formed without hosts that are lost.
    var goesOnWithoutLost: Bool { get }
    /// - Parameter waits: the answer may come when the host has drained.
    /// - Returns: nil when it has nothing to say yet.
    func ask(host: Int, _ message: HostMessage, waits: Bool) async throws -> Stamped<HostAnswer>?
    func ask(remote: Int, _ message: RemoteMessage) async throws -> (answer: Stamped<RemoteAnswer>, at: Double?)
}

/// Keeps the coordinator's record where whoever is elected next finds it.
package protocol CoordinatorStore: Sendable {
    /// Durably; it may take as long as a call. Fails also when another was elected.
    func save(_ record: CoordinatorRecord) throws
}

/// Of the group's thread alone.
final class Conversations {
    private let client: any CoordinationClient
    private let mailbox: Mailbox<GroupHandle.Message>
    private struct Call {
        /// It was begun, or something was heard in it.
        var since: UInt64
        var task: Task<Void, Never>
    }
    private var hosts: [Int: (question: HostRequest, call: Call)] = [:]
    /// Why remotes have not answered what they were asked last.
    private var problems: [Int: String] = [:]
    var problem: String? {
        problems.isEmpty ? nil : problems.sorted { $0.key < $1.key }.map(\.value).joined(separator: "; ")
    }
    private var remotes: [Int: (question: RemoteRequest, call: Call)] = [:]
    private var surveys: Task<Void, Never>?
    /// Since when hosts have not been reached.
    private var unreached: [Int: UInt64] = [:]
    private static let longestSilence: UInt64 = 2_000_000_000
    /// A call that has not been answered for so long is made anew, if it is asked for.
    private static let patience: UInt64 = 1_000_000_000

    init(_ client: any CoordinationClient, _ mailbox: Mailbox<GroupHandle.Message>) {
        (self.client, self.mailbox) = (client, mailbox)
    }

    func end() {
        for (_, call) in hosts.values { call.task.cancel() }
        for (_, call) in remotes.values { call.task.cancel() }
        surveys?.cancel()
        (hosts, remotes, surveys) = ([:], [:], nil)
    }

    func survey(own: Survey) {
        surveys?.cancel()
        let (client, mailbox) = (client, mailbox)
        surveys = Task {
            let others = await client.survey()
            guard !Task.isCancelled else { return }
            let all = Survey(
                changed: own.changed || others.changed, problem: own.problem ?? others.problem,
                highest: max(own.highest, others.highest), absent: others.absent)
            mailbox.send(.event(.surveyed(all), epoch: 0))
        }
    }

    /// A host that has not been reached for so long is lost.
    private func noteReach(_ host: Int, _ isReached: Bool) {
        let now = monotonicNanoseconds()
        guard !isReached, client.goesOnWithoutLost else { return unreached[host] = nil }
        let since = unreached[host] ?? now
        unreached[host] = since
        if now - since > Self.longestSilence { mailbox.send(.event(.hostLost(host), epoch: 0)) }
    }

    func ask(host: Int, _ message: HostMessage) {
        let now = monotonicNanoseconds()
        if let (question, call) = hosts[host] {
            if question == message.request.body, now - call.since < Self.patience { return }
            // It is cancelled, and says nothing any more: who has been silent for so long is not reached.
            if now - call.since >= Self.patience { noteReach(host, false) }
            call.task.cancel()
        }
        let (client, mailbox) = (client, mailbox)
        let task = Task {
            var (waits, isReached) = (false, true)
            while !Task.isCancelled {
                let reply: Stamped<HostAnswer>?
                do { reply = try await client.ask(host: host, message, waits: waits) } catch {
                    isReached = false
                    break
                }
                guard let answer = reply else { break }
                guard !Task.isCancelled else { return }
                mailbox.send(.event(.host(host, answer), epoch: 0))
                mailbox.send(.callAnswered(host: host))
                guard case .ran = answer.body else { break }
                waits = true
            }
            guard !Task.isCancelled else { return }
            mailbox.send(.callEnded(host: host, remote: nil, isReached: isReached))
        }
        hosts[host] = (message.request.body, Call(since: now, task: task))
    }

    func ask(remote: Int, _ message: RemoteMessage) {
        let now = monotonicNanoseconds()
        if let (question, call) = remotes[remote] {
            if question == message.request.body, now - call.since < Self.patience { return }
            call.task.cancel()
        }
        let (client, mailbox) = (client, mailbox)
        let task = Task {
            var problem: String?
            do {
                let (answer, at) = try await client.ask(remote: remote, message)
                guard !Task.isCancelled else { return }
                mailbox.send(.event(.remote(remote, answer, at: at), epoch: 0))
            } catch { problem = "\(error)" }
            guard !Task.isCancelled else { return }
            mailbox.send(.callEnded(host: nil, remote: remote, isReached: true, problem: problem))
        }
        remotes[remote] = (message.request.body, Call(since: now, task: task))
    }

    /// A host has said something in a call that goes on.
    func answered(host: Int) {
        hosts[host]?.call.since = monotonicNanoseconds()
        noteReach(host, true)
    }

    /// What is asked next is a call of its own.
    func ended(host: Int?, remote: Int?, isReached: Bool, problem: String?) {
        if let host {
            hosts[host] = nil
            noteReach(host, isReached)
        }
        if let remote { (remotes[remote], problems[remote]) = (nil, problem) }
    }
}
