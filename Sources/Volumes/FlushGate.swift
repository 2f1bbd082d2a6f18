// FlushGate.swift: which successes of flushes can be believed.
//
// The kernel tells a write-back error of a file once, to the flush (or write with FUA) that looks first. Others that are under way then
// succeed, although what they were to make durable is lost, and their completions may come before that of the one that was told.
//
// Must be prevented: a success is passed on while an earlier flush of the same file, whose outcome is not known yet, may have taken an
// error that was meant for it
//
// So a success waits until everything that was issued before it completed has completed as well, and is an error if one of those was.
//
// Owner: the volume.

import Base

struct FlushGate: ~Copyable {
    private let capacity: UInt64
    /// By number: has completed.
    private let ended: UnsafeMutablePointer<Bool>
    /// Of the next that is issued, and of the oldest that has not completed.
    private var next: UInt64 = 0
    private var oldest: UInt64 = 0
    /// Successes in the order of their completion. What was issued before each has to complete first.
    private let waiting: UnsafeMutablePointer<(io: StoreIO, barrier: UInt64)>
    private var head: UInt64 = 0
    private var tail: UInt64 = 0

    /// - Parameter capacity: flushes that may be under way or wait, at most one for each request or job that asks for one.
    init(capacity: Int) {
        self.capacity = UInt64(capacity)
        ended = .allocate(capacity: capacity)
        ended.initialize(repeating: false, count: capacity)
        waiting = .allocate(capacity: capacity)
    }

    deinit {
        ended.deallocate()
        waiting.deallocate()
    }

    /// A flush is issued.
    mutating func begin() -> UInt64 {
        invariant(next - oldest < capacity, "who asked for a flush waits for it")
        ended[Int(next % capacity)] = false
        next += 1
        return next - 1
    }

    /// It has completed with success; `pop` gives it back when that can be believed.
    mutating func succeeded(_ io: StoreIO) {
        end(io.flushNumber)
        invariant(tail - head < capacity, "who asked for a flush waits for it")
        waiting[Int(tail % capacity)] = (io, next)
        tail += 1
    }

    mutating func failed(_ io: StoreIO) { end(io.flushNumber) }

    private mutating func end(_ number: UInt64) {
        ended[Int(number % capacity)] = true
        while oldest < next, ended[Int(oldest % capacity)] { oldest += 1 }
    }

    /// The next success that waits for nothing any more.
    ///
    /// - Parameter all: one has failed: nothing is to be waited for.
    mutating func pop(all: Bool) -> StoreIO? {
        guard head < tail, all || waiting[Int(head % capacity)].barrier <= oldest else { return nil }
        head += 1
        return waiting[Int((head - 1) % capacity)].io
    }
}
