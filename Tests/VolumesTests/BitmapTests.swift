import Testing
import Volumes

/// A bitmap beside a plain array that says what it must hold.
@Test("bitmap runs agree with a model", arguments: 1...20)
func model(seed: Int) {
    let count = 1 + seed * 37
    let memory = UnsafeMutableRawPointer.allocate(byteCount: Bitmap.byteCount(bits: count), alignment: 8)
    defer { memory.deallocate() }
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: Bitmap.byteCount(bits: count))
    let bitmap = Bitmap(memory: memory, count: count)
    var model = Array(repeating: false, count: count)
    for _ in 0..<400 {
        let lower = Int.random(in: 0...count)
        let range = lower..<Int.random(in: lower...count)
        let set = Bool.random()
        let changed = range.filter { model[$0] != set }.count
        #expect((set ? bitmap.set(range) : bitmap.clear(range)) == changed)
        for index in range { model[index] = set }
        let start = Int.random(in: 0..<count)
        let window = start..<Int.random(in: start...count)
        #expect(bitmap.firstSet(in: window) == window.first { model[$0] })
        #expect(bitmap.firstClear(in: window) == window.first { !model[$0] })
        #expect(bitmap.population() == model.filter { $0 }.count)
    }
}

@Test("adding counts what is new")
func add() {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 32, alignment: 8)
    defer { memory.deallocate() }
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: 32)
    let (first, second) = (Bitmap(memory: memory, count: 100), Bitmap(memory: memory + 16, count: 100))
    first.set(10..<30)
    second.set(20..<90)
    #expect(first.add(second) == 60)
    #expect(second.population() == 70 && first.population() == 80)
}

@Test("buffers are aligned, disjoint, and join again when they are given back")
func bufferPool() {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    defer { memory.deallocate() }
    var pool = BufferPool(base: memory, size: 1 << 20)
    var taken: [(UnsafeMutableRawPointer, Int)] = []
    for _ in 0..<5000 {
        if Bool.random(), let size = [1, 4096, 5000, 70_000, 200_000].randomElement() {
            if let buffer = pool.take(size) {
                #expect(!taken.contains { buffer < $0.0 + $0.1 && $0.0 < buffer + size })
                #expect((buffer - memory) % 4096 == 0 && buffer - memory + size <= 1 << 20)
                taken.append((buffer, size))
            }
        } else if !taken.isEmpty {
            pool.give(taken.remove(at: Int.random(in: 0..<taken.count)).0)
        }
    }
    for (buffer, _) in taken { pool.give(buffer) }
    #expect(pool.freeBytes == 1 << 20)
    #expect(pool.take(1 << 20) != nil, "everything has joined again")
}

@Test("the default grain keeps a bitmap within its bound, and the last grain may be short")
func geometry() {
    #expect(Geometry.defaultGrain(size: 1 << 40) == 4096)
    #expect(Geometry.defaultGrain(size: 16 << 40) == 65536)
    #expect(Geometry(size: 4096, grain: 3000) == nil && Geometry(size: 0, grain: 4096) == nil)
    let geometry = Geometry(size: 10_000, grain: 4096)!
    #expect(geometry.grainCount == 3)
    #expect(geometry.grains(offset: 4095, length: 2) == 0..<2)
    #expect(geometry.byteRange(1..<3) == 4096..<10_000)
}
