// Limits.swift: every bound of the data path in one place, with the relations that must hold between them.

/// The bounds of queues, buffers, names and waits. Sizes are bytes unless the name says otherwise.
package enum Limits {
    /// The largest payload of one READ or WRITE (NBD document, "Size constraints": clients may send up to this unasked).
    package static let maximumPayload = 32 << 20
    /// The longest data of one handshake option that is read into memory; longer ones are skipped.
    package static let maximumOptionLength = 64 << 10
    /// An option longer than this ends the connection instead of being skipped.
    package static let maximumSkippedOptionLength = 1 << 20
    /// Replies to options that arrived together; beyond this the connection ends.
    package static let maximumHandshakeReplies = 1 << 20
    /// Older copies since which an export tells what changed: the newest of them.
    package static let changeBasesPerExport = 64
    /// Metadata contexts that one connection may select.
    package static let contextsPerConnection = 16
    /// The longest export name (NBD document, "Values": strings are at most 4096 bytes).
    package static let maximumNameLength = 4096
    /// A client that neither sends the rest of a payload nor takes its replies is ended after this long if others wait
    /// for memory, in seconds.
    package static let stalledClientSeconds = 3

    /// Connections of one reactor, in any phase.
    package static let connectionsPerReactor = 1024
    /// Requests of one connection between arrival and the last byte of their reply.
    package static let requestsPerConnection = 256
    /// Requests of one volume between arrival and the last byte of their reply.
    package static let requestsPerVolume = 1024
    /// Of these, so many are the drain's alone: what it reads may be what the others wait for.
    package static let requestsOfDrain = 16
    /// Grain copies (preserve, restore, hand-over) of one volume that may be under way.
    package static let copyJobsPerVolume = 128
    /// The longest run of grains that one copy job moves.
    package static let copyJobBytes = 1 << 20
    /// What volumes take at a time of their group's memory for old images.
    package static let imageChunkBytes = 256 << 10
    /// A request that needs grains preserved is carried out in windows of this size.
    package static let writeWindowBytes = 4 << 20
    /// Receive buffer of one connection.
    package static let receiveBuffer = 128 << 10
    /// Unix sockets that are read in pieces larger than `wideReply` have send buffers of `wideSendBuffer` (the kernel takes
    /// about twice that), so many of each reactor.
    package static let wideReply = 32 << 10
    package static let wideSendBuffer = 1 << 20
    package static let wideConnectionsPerReactor = 64
    /// Replies gathered into one send.
    package static let repliesPerSend = 64
    /// Descriptors of one BLOCK_STATUS chunk, and file-system queries made for one request.
    package static let statusDescriptors = 1024
    package static let statusQueries = 256
    /// Runs of one READ's reply that are told apart into data and holes.
    package static let runsPerReply = 16
    /// Zeroes of at least this many bytes, aligned to it, are sent as a hole.
    package static let holeUnit = 4096
    /// Payload memory that one connection may hold; a single request may always have what it needs.
    package static let payloadPerConnection = 32 << 20
    /// Payload memory of one reactor (address space; pages are touched on demand).
    package static let payloadPool = 256 << 20
    /// Connections that hold no more than `smallPayload` may use all of the pool; the others leave `payloadReserve` of it.
    package static let smallPayload = 128 << 10
    package static let payloadReserve = 64 << 20
    /// So much of a larger payload must have arrived before it gets memory.
    package static let payloadShown = 32 << 10
    /// Memory for copy jobs of one reactor, apart from payloads so that a write can always have its grains preserved.
    package static let copyPool = 64 << 20
    /// Messages waiting for one thread; a reactor's mailbox has room besides for what each group and volume may ask at once.
    package static let mailboxCapacity = 4096
    package static let messagesPerGroup = 512
    package static let messagesPerVolume = 4
    /// Entries of one submission queue.
    package static let ringEntries = 1024

    /// Connections to all control addresses of a site, and how long one may be idle, in seconds.
    package static let controlConnections = 512
    package static let controlIdleSeconds = 60
    /// Descriptors that nobody may count on: for what is open for a moment, and for accepting a client that is refused.
    package static let spareDescriptors = 64
    /// Connections that there must be descriptors for, or a site does not start.
    package static let fewestClients = 16
    package static let fewestControlConnections = 32
    /// How long a listening socket rests when there is no descriptor, or no memory, for another connection.
    package static let acceptPauseMilliseconds = 100

    /// FlashCopies (recovery points included) of one volume.
    package static let copiesPerVolume = 256
    /// So many less by command: recovery points, and what restores keep, need room as well.
    package static let copiesKeptFree = 8
    /// A region to which nothing is written for this long, or twice that, leaves the activity log.
    package static let activitySweepSeconds = 10
    /// Recovery points of one group; their volumes' chains have room for FlashCopies beside them.
    package static let pointsPerGroup = 192
    /// Memory of a link for what is on its way, and the part that is read and sent as one (more if a grain is larger).
    package static let linkWindowBytes = 64 << 20
    package static let linkSlotBytes = 256 << 10
    /// Parts that may be on their way over the slowest of links.
    package static let linkSmallestWindow = 4
    /// Connections of a link to one volume.
    package static let connectionsPerLink = 16
    /// Volumes of one group.
    package static let volumesPerGroup = 64
    /// Acknowledgements are let go after this long even if the point could not be formed; the point is then given up.
    package static let holdMilliseconds = 50

    /// Bytes that one call asks checksums of.
    package static let checksumBytes = 1 << 20
    /// Such calls that have memory at a time, and that may wait for it; a peer has at most 32 under way.
    package static let checksumsAtOnce = 16
    package static let checksumsWaiting = 256
    /// Words of bitmaps in one answer to a peer.
    package static let changedWordsPerAnswer = 16 << 10
    /// A site that is asked to give up a role and could not begin after this long is asked again.
    /// Calls of the control plane that wait for the disk at the same time.
    package static let diskThreads = 16
    package static let diskThreadsPerCaller = 4
    /// For which hosts wait for the peer to note that nothing else can say any more what they change.
    package static let distrustSeconds = 3
    package static let yieldWaitSeconds = 60
    /// Dropping recovery points waits so long until their files are gone.
    package static let dropSeconds = 60
    /// A switchover that has not sent its last point after this long lets hosts write again.
    package static let handOverSeconds = 60

    /// The smallest and the largest grain.
    package static let minimumGrain = 4 << 10
    package static let maximumGrain = 1 << 20
    /// The largest bitmap that the default grain leads to.
    package static let preferredBitmapBits = 1 << 28

    /// Checks the relations between the bounds; called when a site starts and by a unit test.
    package static func validate() {
        invariant(maximumPayload <= payloadPerConnection, "one payload fits a connection")
        invariant(8 * payloadPerConnection <= payloadPool, "one connection cannot take all payload memory")
        invariant(
            maximumPayload <= payloadPool - payloadReserve, "the largest payload fits beside the reserve")
        invariant(payloadShown + 64 <= receiveBuffer, "what a payload must show fits the receive buffer")
        invariant(copyJobBytes >= maximumGrain, "a copy job moves at least one grain")
        invariant(imageChunkBytes <= 64 * minimumGrain, "a word has a bit for each image of a chunk")
        invariant(
            copyPool >= copyJobBytes, "the copy pool holds at least one job")
        invariant(writeWindowBytes >= copyJobBytes, "a window holds at least one job")
        invariant(requestsPerConnection <= requestsPerVolume, "one connection fits a volume")
        invariant(messagesPerGroup >= 2 * linkWindowBytes / linkSlotBytes, "a group's reads fit a mailbox")
        invariant(receiveBuffer > 4 * maximumNameLength, "a name fits the receive buffer")
    }
}
