import FlashCopies
import Testing
import Volumes

@Test("what a copy's record means after a restart")
func resumption() {
    func record(_ state: CopyRecord.State, durable: Bool = false, complete: Bool = false) -> CopyRecord {
        var record = CopyRecord(id: 1, name: "a", createdAt: 0, order: 1, state: state)
        record.isDurable = durable
        record.isComplete = complete
        return record
    }
    func resume(_ record: CopyRecord, trusted: Bool, overtaken: Bool = false) -> (
        CopyRecord.Resumption, CopyRecord.State
    ) {
        var record = record
        return (record.resume(trusted: trusted, overtaken: overtaken), record.state)
    }
    #expect(resume(record(.active), trusted: true) == (.serves, .active))
    #expect(resume(record(.creating), trusted: true) == (.leaves, .creating))
    #expect(resume(record(.failed), trusted: true) == (.servesOlder, .failed))
    #expect(resume(record(.refreshing), trusted: true) == (.leaves, .refreshing))
    #expect(resume(record(.refreshing), trusted: true, overtaken: true) == (.absent, .lost))
    #expect(resume(record(.active), trusted: false) == (.absent, .lost))
    #expect(resume(record(.creating), trusted: false) == (.forgotten, .lost))
    #expect(resume(record(.withdrawing), trusted: false) == (.forgotten, .lost))
    #expect(resume(record(.active, durable: true), trusted: false) == (.serves, .active))
    #expect(resume(record(.active, complete: true), trusted: false) == (.serves, .active))
    #expect(resume(record(.refreshing, complete: true), trusted: false) == (.absent, .lost))
    var grown = record(.active)
    grown.completeBytes = 4096
    #expect(resume(grown, trusted: false) == (.serves, .active))
}

@Test("after power loss a copy may lack changes where clients could write to it, or to a newer one, or that is lost")
func changesAfterPowerLoss() {
    func record(_ id: CopyID, _ state: CopyRecord.State = .active, writable: Bool = false) -> CopyRecord {
        var record = CopyRecord(id: id, name: "c\(id)", createdAt: 0, order: UInt64(id), state: state)
        record.isWritable = writable
        return record
    }
    func lacking(_ chain: [CopyRecord]) -> [CopyID] { chain.filter { $0.mayLackChanges(in: chain) }.map(\.id) }
    #expect(lacking([record(1), record(2), record(3)]).isEmpty)
    #expect(lacking([record(1), record(2, writable: true), record(3)]) == [1, 2])
    #expect(lacking([record(1), record(2, .lost), record(3)]) == [1])
    #expect(lacking([record(1), record(2, .refreshing, writable: true)]) == [1, 2])
    var closed = record(2, writable: true)
    closed.allowWrites(false)
    #expect(!closed.isWritable && lacking([record(1), closed]) == [1, 2], "it was written to before")
    closed.allowWrites(false)
    #expect(lacking([record(1), closed]) == [1, 2])
    var untouched = record(2)
    untouched.allowWrites(false)
    #expect(lacking([record(1), untouched]).isEmpty)
}

@Test("what power loss took of a copy that nobody is to be told of is forgotten, also by a start after one that ended")
func forgottenCopies() {
    for state in [CopyRecord.State.creating, .withdrawing] {
        var record = CopyRecord(id: 1, name: "c", createdAt: 0, order: 1, state: state)
        #expect(record.resume(trusted: false, overtaken: false) == .forgotten)
        #expect(record.resume(trusted: false, overtaken: false) == .forgotten)
        #expect(record.resume(trusted: true, overtaken: false) == .forgotten)
    }
    var record = CopyRecord(id: 1, name: "c", createdAt: 0, order: 1, state: .active)
    #expect(record.resume(trusted: false, overtaken: false) == .absent)
    #expect(record.resume(trusted: true, overtaken: false) == .absent)
}

@Test("what comes too late changes nothing")
func statesOfACopy() {
    let states: [CopyRecord.State] = [.creating, .active, .refreshing, .withdrawing, .failed, .lost]
    let table = states.map { from in states.map { from.mayBecome($0) ? "y" : "." }.joined() }
    //                  creating, active, refreshing, withdrawing, failed, lost
    #expect(table == [".y.yyy", "..yyyy", "..yyyy", "...y.y", "..yyyy", ".....y"])
    var chain = CopyTable()
    chain.apply(.added(CopyRecord(id: 1, name: "c", createdAt: 0, order: 1, state: .creating)))
    chain.apply(.failed(1, reason: "full"))
    chain.apply(.active(1))
    #expect(chain[1]?.state == .failed && chain[1]?.reason == "full")
    chain.apply(.withdrawing(1, alone: true))
    chain.apply(.failed(1, reason: "again"))
    #expect(chain[1]?.state == .withdrawing && chain[1]?.reason == "full")
    chain.apply(.left(1))
    #expect(chain.copies.isEmpty)
    chain.apply(.added(CopyRecord(id: 2, name: "d", createdAt: 0, order: 2, state: .active)))
    chain.apply(.refreshing(2))
    chain.apply(.left(2))
    #expect(chain[2]?.state == .lost, "it stays in the list")
    for change in [CopyChange.withdrawing(2, alone: true), .failed(2, reason: "late"), .refreshing(2), .active(2)] {
        chain.apply(change)
        #expect(chain[2]?.state == .lost)
    }
}
