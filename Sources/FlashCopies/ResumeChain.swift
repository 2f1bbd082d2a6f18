// ResumeChain.swift: how a volume's chain goes on from what the last run left.
//
// Must be prevented:
//   a copy whose bits power loss may have taken serves its readers or an older one
//   a copy that had failed when the last process ended serves as if it had not
//   a copy reads through a newer one of which nobody knows what it has
//   files go before the record says that they are not needed
//   what a copy that is forgotten has noted for older ones goes with it

import Groups
import Volumes

/// A recovery point or FlashCopy that takes its place in the chain.
package struct ChainLink: Sendable, Equatable {
    package var copy: CopyRecord
    package var resumption: CopyRecord.Resumption
    /// It is written down in the group's record.
    package var isPoint: Bool
    package var id: CopyID { copy.id }

    package init(_ copy: CopyRecord, _ resumption: CopyRecord.Resumption, isPoint: Bool = false) {
        (self.copy, self.resumption, self.isPoint) = (copy, resumption, isPoint)
    }
}

/// What the files of a link are.
package enum LinkFiles: Sendable, Equatable {
    case whole
    /// They say that it had failed, perhaps before that could be written down.
    case failed
    case damaged
}

/// Of one volume, whose engine has begun to resume.
package struct ResumeChain: CopyStepTable {
    enum State {
        case begins, finds, writesDown, opens
        case marks(Int), loses(Set<CopyID>), drops, enters(Int), flushes, forgets
    }
    var state = State.begins
    private let isTrusted: Bool
    private let points: [ChainLink]
    private var links: [ChainLink] = []
    private var files: [LinkFiles] = []
    private var forgotten: Set<CopyID> = []
    /// So many of the oldest are lost.
    private var lost = 0

    /// - Parameters:
    ///   - trusted: mapped files are as the last process left them.
    ///   - points: of which the volume has files.
    package init(trusted: Bool, points: [ChainLink]) { (isTrusted, self.points) = (trusted, points) }

    /// - Returns: what is in the chain.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Set<CopyID>> {
        let table = tables[0]
        switch (state, answer) {
        case (.begins, .begin):
            let successors = table.copies.compactMap { successor(of: $0, table) }
            return successors.isEmpty ? resume(table, []) : go(.finds, .findTaken(successors))
        case (.finds, .taken(let taken)): return resume(table, taken)
        case (.writesDown, .done): return go(.opens, .openFiles(links))
        case (.opens, .opened(let files)):
            self.files = files
            return mark(0)
        case (.marks(let index), .done): return mark(index + 1)
        case (.marks(let index), .pointFailed(let isKept)):
            if !isKept { links[index].resumption = .leaves }
            return mark(index + 1)
        case (.loses(let ids), .done): return go(.drops, .loseFiles(ids))
        case (.drops, .done): return enter(lost)
        case (.enters(let index), .done): return enter(index + 1)
        case (.flushes, .done): return go(.forgets, .change(0, .forgotten(forgotten)))
        case (.forgets, .done): return .done(chain)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    /// The copy that was to take the place of one that was being taken anew; it may have failed since.
    private func successor(of copy: CopyRecord, _ table: CopyTable) -> CopyID? {
        guard copy.state == .refreshing else { return nil }
        return table.copies.first {
            $0.state != .lost && $0.targetOwner == copy.targetOwner && $0.order > copy.order
        }?.id
    }

    /// - Parameter taken: successors that have begun to use the target.
    private mutating func resume(_ table: CopyTable, _ taken: Set<CopyID>) -> CopyStep<Set<CopyID>> {
        var copies = table.copies
        links = points
        for index in copies.indices {
            let isOvertaken = successor(of: table.copies[index], table).map { taken.contains($0) } ?? false
            let resumption = copies[index].resume(trusted: isTrusted, overtaken: isOvertaken)
            links.append(ChainLink(copies[index], resumption))
        }
        forgotten = Set(links.filter { $0.resumption == .forgotten }.map(\.id))
        links.removeAll { $0.resumption == .forgotten || $0.resumption == .absent }
        links.sort { $0.copy.order < $1.copy.order }
        return copies == table.copies ? go(.opens, .openFiles(links)) : go(.writesDown, .change(0, .resumed(copies)))
    }

    private mutating func mark(_ first: Int) -> CopyStep<Set<CopyID>> {
        guard
            let index = links.indices.dropFirst(first).first(where: {
                files[$0] == .failed && links[$0].resumption == .serves
            })
        else { return lose() }
        links[index].resumption = .servesOlder
        let id = links[index].id
        return go(
            .marks(index),
            links[index].isPoint
                ? .failPoint(id) : .change(0, .failed(id, reason: "old content could not be preserved")))
    }

    /// Copies up to one whose files are damaged: they read through it, and nobody knows what it has.
    private mutating func lose() -> CopyStep<Set<CopyID>> {
        lost = files.lastIndex(of: .damaged).map { $0 + 1 } ?? 0
        guard lost > 0 else { return enter(0) }
        let ids = Set(links[..<lost].map(\.id))
        return go(
            .loses(ids),
            .change(
                0, .lost(ids, reason: "its bitmap or target, or that of a newer copy that it reads through, is damaged")
            ))
    }

    private var chain: Set<CopyID> { Set(links[lost...].map(\.id)) }

    private mutating func enter(_ index: Int) -> CopyStep<Set<CopyID>> {
        guard index < links.count else {
            return forgotten.isEmpty ? .done(chain) : go(.flushes, .flushChanges(0))
        }
        return go(.enters(index), .resume(links[index]))
    }
}
