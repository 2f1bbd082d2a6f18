// KeptRecord.swift: a record as it stands in memory and on disk. Saves wait for the disk elsewhere, one after the other.
//
// Must be prevented:
//   memory says what the disk does not: a change counts once it is on stable storage, or not at all
//   a save that failed and reached the disk all the same is found by the next start, although it was taken back: until a later save
//     has succeeded, the record is `isUnsaved`, and nothing may begin that this would spoil (`settle`)
//   what happens while a save is under way is lost with it, or a save overtakes a later one

import Base

package final class KeptRecord<Value: VersionedRecord> {
    package private(set) var value: Value
    private let write: (Value) async throws -> Void
    private let saving = Turnstile()
    /// Counts the changes of `value`.
    private var revision = 0
    /// The one that the file holds for sure; nil = it may hold another value.
    private var savedRevision: Int? = 0

    /// The file may hold another value than `value`.
    package var isUnsaved: Bool { savedRevision != revision }

    /// - Parameter write: makes a value durable.
    package init(_ value: Value, write: @escaping (Value) async throws -> Void) {
        self.value = value
        self.write = write
    }

    /// Changes the value, durably; when that fails nothing has changed.
    ///
    /// - Parameter change: is made once more when something else has happened during the save; what comes too late changes nothing.
    package func amend(
        isolation: isolated (any Actor)? = #isolation, _ change: (inout Value) -> Void
    ) async throws {
        await saving.enter()
        defer { saving.leave() }
        let before = revision
        var next = value
        change(&next)
        savedRevision = nil
        try await write(next)
        if revision == before { value = next } else { change(&value) }
        let isWhole = revision == before
        revision += 1
        if isWhole { savedRevision = revision }
    }

    /// Takes over what has happened already, and cannot be taken back: memory says so at once, the file once it is settled.
    package func acknowledge(_ change: (inout Value) -> Void) {
        change(&value)
        revision += 1
    }

    /// Makes sure that the file holds this value.
    package func settle(isolation: isolated (any Actor)? = #isolation) async throws {
        guard isUnsaved else { return }
        await saving.enter()
        defer { saving.leave() }
        guard isUnsaved else { return }  // somebody has saved it meanwhile
        let saved = revision
        savedRevision = nil
        try await write(value)
        savedRevision = saved
    }
}
