import API
import FoundationEssentials
import Testing

@Test("every call has a place of its own, below one root")
func places() {
    #expect(Set(Endpoints.all.map(\.id)).count == Endpoints.all.count)
    for call in Endpoints.all {
        #expect(call.path.hasPrefix("/v1/"), "\(call.path)")
        #expect((call.caller == .peer) == call.path.hasPrefix("/v1/peer/"), "\(call.path)")
        #expect(call.method != .get || call.caller != .peer || call.path.hasSuffix("/changes"), "\(call.path)")
    }
}

@Test("names and words of a URL are encoded")
func urls() {
    #expect(Endpoints.status.call.url() == "/v1/status")
    #expect(Endpoints.status.call.url("", [.group: "a&b"]) == "/v1/status?group=a%26b")
    #expect(Endpoints.flashCopy.call.url("x/y", [.volumes: "one,two"]) == "/v1/flashcopies/x%2fy?volumes=one%2ctwo")
    #expect(
        Endpoints.changes.call.url("shop", [.from: "64", .volume: "disk"]).hasSuffix(
            "/shop/changes?volume=disk&from=64"))
    #expect(Endpoints.suspend.call.placeholder == "group" && Endpoints.status.call.placeholder == nil)
}

@Test("the answer to a cycle is the point, or that one was asked for")
func cycleAnswers() throws {
    func again(_ answer: CycleAnswer) throws -> CycleAnswer {
        try JSONDecoder().decode(CycleAnswer.self, from: JSONEncoder().encode(answer))
    }
    let point = StatusReport.PointReport(id: 7, formedAt: "then", committedAt: "later")
    switch try again(.committed(point)) {
    case .committed(let found): #expect(found.id == 7 && found.committedAt == "later" && found.bytes == nil)
    case .asked: Issue.record("the point is lost")
    }
    switch try again(.asked(Done(done: "asked"))) {
    case .asked(let done): #expect(done.done == "asked")
    case .committed: Issue.record("there is no point")
    }
}
