// KeptRecord.swift: a record as it stands in memory and on disk.
//
// Must be prevented:
//   memory says what the disk does not: a change counts once it is on stable storage, or not at all
//   a save that failed and reached the disk all the same is found by the next start, although it was taken back: until a later save
//     has succeeded, the record is `isUnsaved`, and nothing may begin that this would spoil (`settle`)

import Base

package final class KeptRecord<Value: VersionedRecord> {
    package private(set) var value: Value
    private let write: (Value) throws -> Void
    /// The file may hold another value than `value`.
    package private(set) var isUnsaved = false

    /// - Parameter write: makes a value durable.
    package init(_ value: Value, write: @escaping (Value) throws -> Void) {
        self.value = value
        self.write = write
    }

    /// Changes the value, durably; when that fails nothing has changed.
    package func amend(_ change: (inout Value) throws -> Void) throws {
        var next = value
        try change(&next)
        try save(next)
        value = next
    }

    /// Takes over what has happened already, and cannot be taken back: memory says so at once, the file as soon as it can be written.
    package func acknowledge(_ change: (inout Value) -> Void) {
        change(&value)
        try? save(value)
    }

    /// Makes sure that the file holds this value.
    package func settle() throws {
        if isUnsaved { try save(value) }
    }

    private func save(_ next: Value) throws {
        isUnsaved = true
        try write(next)
        isUnsaved = false
    }
}
