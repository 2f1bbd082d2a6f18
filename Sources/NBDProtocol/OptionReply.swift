// OptionReply.swift: the server's answers to options ("Option reply types").

import Base

/// Encoders of the replies to one option.
struct OptionReply {
    let option: UInt32

    func encode(_ type: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(20 + data.count)
        bytes.appendBigEndian(NBD_REP_MAGIC)
        bytes.appendBigEndian(option)
        bytes.appendBigEndian(type)
        bytes.appendBigEndian(UInt32(data.count))
        return bytes + data
    }

    var acknowledgement: [UInt8] { encode(NBD_REP_ACK) }

    func error(_ type: UInt32, _ message: String) -> [UInt8] {
        encode(type, Array(message.utf8.prefix(Limits.maximumNameLength)))
    }

    func list(_ names: [String]) -> [UInt8] {
        var bytes: [UInt8] = []
        for name in names {
            var data: [UInt8] = []
            data.appendBigEndian(UInt32(name.utf8.count))
            data.append(contentsOf: name.utf8)
            bytes += encode(NBD_REP_SERVER, data)
        }
        return bytes + acknowledgement
    }

    /// EXPORT always; the others when asked for.
    func infos(_ export: ExportDescription, asked: Set<UInt16>) -> [UInt8] {
        var data: [UInt8] = []
        data.appendBigEndian(NBD_INFO_EXPORT)
        data.appendBigEndian(export.size)
        data.appendBigEndian(export.flags.rawValue)
        var bytes = encode(NBD_REP_INFO, data)
        if asked.contains(NBD_INFO_NAME) { bytes += textInfo(NBD_INFO_NAME, export.name) }
        if asked.contains(NBD_INFO_DESCRIPTION), !export.text.isEmpty {
            bytes += textInfo(NBD_INFO_DESCRIPTION, export.text)
        }
        if asked.contains(NBD_INFO_BLOCK_SIZE) { bytes += blockSize(export) }
        return bytes
    }

    private func textInfo(_ type: UInt16, _ text: String) -> [UInt8] {
        var data: [UInt8] = []
        data.appendBigEndian(type)
        data.append(contentsOf: text.utf8.prefix(Limits.maximumNameLength))
        return encode(NBD_REP_INFO, data)
    }

    private func blockSize(_ export: ExportDescription) -> [UInt8] {
        var data: [UInt8] = []
        data.appendBigEndian(NBD_INFO_BLOCK_SIZE)
        data.appendBigEndian(export.minimumBlockSize)
        data.appendBigEndian(export.preferredBlockSize)
        data.appendBigEndian(export.maximumPayload)
        return encode(NBD_REP_INFO, data)
    }

    func contexts(_ contexts: [SelectedContext]) -> [UInt8] {
        var bytes: [UInt8] = []
        for context in contexts {
            var data: [UInt8] = []
            data.appendBigEndian(context.id)
            data.append(contentsOf: context.name.utf8)
            bytes += encode(NBD_REP_META_CONTEXT, data)
        }
        return bytes + acknowledgement
    }
}
