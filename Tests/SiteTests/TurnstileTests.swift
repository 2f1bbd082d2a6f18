import Site
import Testing

private actor Hall {
    let turnstile = Turnstile(places: 2)
    private(set) var inside = 0
    private(set) var most = 0
    private(set) var order: [Int] = []
    var waiting: Int { turnstile.waitingCount }

    func visit(_ number: Int) async {
        await turnstile.enter()
        defer { turnstile.leave() }
        inside += 1
        most = max(most, inside)
        order.append(number)
        try? await Task.sleep(for: .milliseconds(1))
        inside -= 1
    }

    func open() { turnstile.leave() }
    func close() async { await turnstile.enter() }
}

@Test("a turnstile lets as many through as it has places, in order, and says how many wait")
func turnstileCounts() async {
    let hall = Hall()
    await hall.close()
    await hall.close()
    await withTaskGroup(of: Void.self) { tasks in
        for number in 0..<20 {
            tasks.addTask { await hall.visit(number) }
            while await hall.waiting != number + 1 { await Task.yield() }
        }
        await hall.open()
        await hall.open()
    }
    #expect(await hall.order == Array(0..<20))
    #expect(await hall.most == 2)
    #expect(await hall.waiting == 0)
    await hall.close()
    await hall.close()
    #expect(await hall.waiting == 0)
}

private actor TwoDoors {
    let first = Turnstile()
    let group = Turnstile()
    private(set) var through = 0

    func enterBoth() async {
        await enterTogether(first, [group])
        through += 1
        group.leave()
        first.leave()
    }

    func closeGroup() async { await group.enter() }
    func openGroup() { group.leave() }
    var areFree: Bool { first.isFree && group.isFree }
}

/// Whoever gets through between two of them hands a turnstile on while it is free for nobody.
@Test("several who enter two turnstiles together while one is taken all get through", .timeLimit(.minutes(1)))
func turnstilesTogether() async {
    let doors = TwoDoors()
    await doors.closeGroup()
    await withTaskGroup(of: Void.self) { tasks in
        for _ in 0..<4 { tasks.addTask { await doors.enterBoth() } }
        try? await Task.sleep(for: .milliseconds(50))
        await doors.openGroup()
    }
    #expect(await doors.through == 4)
    #expect(await doors.areFree)
}
