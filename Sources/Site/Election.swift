// Election.swift: which host of a group coordinates it, by a lease in etcd. The coordinator's record is kept there as well, so that whoever is
// elected next takes up or gives up what it finds.
//
// Must be prevented:
//   two hosts coordinate a group: each save of the record is refused unless the election still stands, and hosts and remotes refuse an epoch
//     that has been followed; the lease only says when to stand for it
//   a decision is lost with the host that has made it

import Base
import Dispatch
import Etcd
import FoundationEssentials
import Groups
import Link
import Ring
import Synchronization

/// The record of the coordinator, in etcd.
final class ElectedRecord: CoordinatorStore {
    private let client: EtcdClient
    private let keys: Election.Keys
    private let epoch: UInt64
    private let revision: Mutex<Int64>

    init(_ client: EtcdClient, _ keys: Election.Keys, epoch: UInt64, revision: Int64) {
        (self.client, self.keys, self.epoch) = (client, keys, epoch)
        self.revision = Mutex(revision)
    }

    func save(_ record: CoordinatorRecord) throws {
        let bytes = [UInt8](try JSONEncoder().encode(record))
        let (client, keys, epoch, before) = (client, keys, epoch, revision.withLock { $0 })
        let after = try waiting {
            try await client.write(bytes, to: keys.record, after: before, whileElected: keys.master, epoch: epoch)
        }
        revision.withLock { $0 = after }
    }

    /// The group's thread waits, for as long as a call may take: nothing of a host's is held meanwhile.
    private func waiting<Value: Sendable>(_ body: @escaping @Sendable () async throws -> Value) throws -> Value {
        let done = DispatchSemaphore(value: 0)
        let outcome = Mutex<Result<Value, any Error>?>(nil)
        let box = Box(outcome)
        Task {
            let result: Result<Value, any Error>
            do { result = .success(try await body()) } catch { result = .failure(error) }
            box.value.withLock { $0 = result }
            done.signal()
        }
        // Each call has its own limit (`EtcdClient`); nobody waits for ever, should that fail.
        guard done.wait(timeout: .now() + .seconds(Self.longestWait)) == .success else {
            throw EtcdFailure("etcd has not answered for \(Self.longestWait) s", isRefusal: false)
        }
        return try box.value.withLock { $0! }.get()
    }

    private static let longestWait = 30

    private final class Box<Value: Sendable>: Sendable {
        let value: Mutex<Result<Value, any Error>?>
        init(_ value: consuming Mutex<Result<Value, any Error>?>) { self.value = value }
    }
}

final class Election: Sendable {
    struct Keys: Sendable {
        var master: String
        var record: String

        init(prefix: String, group: String) {
            (master, record) = ("\(prefix)/\(group)/master", "\(prefix)/\(group)/record")
        }
    }

    private let client: EtcdClient
    private let keys: Keys
    private let site: String
    private let handle: GroupHandle
    private let leaseSeconds: Int64
    private let note: @Sendable (String) -> Void
    /// Why nobody is known to coordinate the group; nil while somebody is.
    private let problem: @Sendable (String?) -> Void
    private let task = Mutex<Task<Void, Never>?>(nil)
    private let known = Mutex<String?>(nil)
    private static let pause = Duration.seconds(1)

    init(
        _ client: EtcdClient, _ keys: Keys, site: String, handle: GroupHandle, leaseSeconds: Int64,
        note: @escaping @Sendable (String) -> Void, problem: @escaping @Sendable (String?) -> Void
    ) {
        self.problem = problem
        (self.client, self.keys, self.site, self.handle) = (client, keys, site, handle)
        (self.leaseSeconds, self.note) = (leaseSeconds, note)
    }

    /// The host that coordinates the group, as etcd said last.
    var master: String? { known.withLock { $0 } }

    func start() { task.withLock { $0 = Task { [self] in await run() } } }

    /// The lease goes at once, so that another host need not wait for its end.
    func stop() async {
        let running = task.withLock { $0 }
        running?.cancel()
        await running?.value
        await client.shutdown()
    }

    private func run() async {
        var last = ""
        while !Task.isCancelled {
            do {
                let lease = try await client.grantLease(seconds: leaseSeconds)
                do { try await hold(lease) } catch {
                    handle.stopCoordinating("\(error)")
                    await letGo(lease)
                    throw error
                }
                handle.stopCoordinating("the site stops")
                await letGo(lease)
            } catch is CancellationError {
                return
            } catch {
                if "\(error)" != last { note("election: \(error)") }
                last = "\(error)"
            }
            known.withLock { $0 = nil }
            problem("no site is known to coordinate the group: \(last)")
            try? await Task.sleep(for: Self.pause)
        }
    }

    /// Also when the election is ended, which would cancel the call.
    private func letGo(_ lease: Int64) async {
        let client = client
        await Task { try? await client.revoke(lease) }.value
    }

    /// Stands for election until it is won, and holds on to it.
    private func hold(_ lease: Int64) async throws {
        while !Task.isCancelled {
            try await client.keepAlive(lease)
            switch try await client.stand(for: keys.master, as: site, lease: lease) {
            case .another(let name):
                if master != name { note("'\(name)' coordinates the group, by etcd") }
                known.withLock { $0 = name }
                problem(nil)
                try await Task.sleep(for: Self.pause)
            case .elected(let epoch):
                try await coordinate(lease, epoch)
            }
        }
    }

    private func coordinate(_ lease: Int64, _ epoch: UInt64) async throws {
        let found = try await client.read(keys.record)
        let record = found.value.flatMap { try? JSONDecoder().decode(CoordinatorRecord.self, from: Data($0)) }
        guard found.value == nil || record?.isPlausible == true, epoch <= PointRecord.highestNumber else {
            let words = String(decoding: (found.value ?? []).prefix(500), as: UTF8.self)
            throw Refusal(
                "what is in etcd under \(keys.record) is no coordinator's record: \(words); remove that key to have the group's points go "
                    + "on from what its hosts know, and have a remote that has prepared a point decide it with `farcopy abort cycle:GROUP`"
            )
        }
        note("this site coordinates the group, by etcd, in epoch \(epoch)")
        known.withLock { $0 = site }
        problem(nil)
        let store = ElectedRecord(client, keys, epoch: epoch, revision: found.revision)
        handle.coordinate(epoch: epoch, record: record, store)
        var aliveAt = monotonicNanoseconds()
        let limit = UInt64(leaseSeconds) * 2 / 3 * 1_000_000_000
        while !Task.isCancelled {
            try await Task.sleep(for: .milliseconds(leaseSeconds * 1000 / 4))
            // Another has saved the record, or this site could not.
            guard handle.status.coordinates else {
                throw Refusal("this site has stopped coordinating: \(handle.status.holdUp ?? "")")
            }
            do {
                try await client.keepAlive(lease)
                aliveAt = monotonicNanoseconds()
            } catch let failure as EtcdFailure where !failure.isRefusal {
                guard monotonicNanoseconds() - aliveAt < limit else { throw failure }
            }
        }
    }
}
