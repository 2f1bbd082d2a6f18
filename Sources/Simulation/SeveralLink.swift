// SeveralLink.swift: the link of a host to its remote in the scenario `SeveralHosts`: a session, and data, flushes and answers on their way, each
// of which may be late or never come.

import Groups

/// The connections of one session, as a host has them.
final class SeveralLink {
    let state: PeerState
    /// The link is made; before, the session is not open.
    var isReady = false
    var flushesLeft = 0
    init(_ state: PeerState) { self.state = state }
}

/// What a remote makes of a wish for a session.
enum SessionReply {
    case opened(PeerState)
    /// `passing`: asked again, it may be another.
    case refused(String, passing: Bool)
}

extension SeveralHost {
    var remote: SeveralRemote { world.remotes[index] }

    /// What a link that is closed since has brought is dropped; the thread looks at it.
    private func bring(_ link: SeveralLink, _ body: @escaping () -> Void) {
        let process = life
        world.later { [unowned self] in
            guard process == life else { return }
            inbox.append { [unowned self] in if self.link === link { body() } }
        }
    }

    private func breaks(_ link: SeveralLink) {
        bring(link) { [unowned self] in loseLink("the connection to the peer ended") }
    }

    func loseLink(_ reason: String) {
        guard let link else { return }
        guard link.isReady else {
            self.link = nil
            return handle(.sessionFailed(reason, retry: true))
        }
        handle(.linkLost(reason))
    }

    func openSession() {
        if fault == .keepClosedLink, let link, link.isReady {
            // The session of before goes on.
            let state = PeerState(
                session: link.state.session, site: link.state.site, lineage: link.state.lineage,
                volumeLineages: link.state.volumeLineages, committed: remote.record.points.last)
            epoch += 1
            let asker = epoch
            return inbox.append { [unowned self] in if asker == epoch { handle(.sessionOpened(state)) } }
        }
        epoch += 1
        let (asker, generations) = (epoch, record.generations)
        world.call(self, remote) { [unowned self] in
            remote.acceptSession(name, generations, $0)
        } done: { [unowned self] (reply: SessionReply?) in
            inbox.append { [unowned self] in sessionAnswered(reply, asker) }
        }
    }

    private func sessionAnswered(_ reply: SessionReply?, _ asker: UInt64) {
        switch reply {
        case nil: event(.sessionFailed("the peer cannot be reached", retry: true), asker)
        case .refused(let reason, let passing): event(.sessionFailed(reason, retry: passing), asker)
        case .opened(let state):
            guard asker == epoch else { return }
            let made = SeveralLink(state)
            link = made
            guard world.isQuiet || !world.random.chance(3), world.reaches(self, remote) else { return breaks(made) }
            bring(made) { [unowned self] in
                made.isReady = true
                handle(.sessionOpened(state))
            }
        }
    }

    func closeLink() {
        epoch += 1
        if fault != .keepClosedLink { link = nil }
    }

    // MARK: Data

    func send(_ slot: Int, _ volume: Int) {
        guard let link, let (grain, content) = slots[slot] else { return handle(.linkLost("the link is closed")) }
        let (remote, session) = (remote, link.state.session)
        world.later { [unowned self] in
            guard remote.isUp, remote.session == session, remote.letsDataIn, world.reaches(self, remote) else {
                return breaks(link)
            }
            remote.write(volume, grain, content) { [unowned self] in
                bring(link) { [unowned self] in acknowledged(slot) }
            }
        }
    }

    private func acknowledged(_ slot: Int) {
        group.adapt(MovePace(limit: 1 + world.random.below(3), checkpointBytes: 1 + world.random.below(3)))
        handle(.move(.sent(slot: slot, wire: 1)))
    }

    func flush(_ volumes: [Int]) {
        guard let link else { return handle(.linkLost("the link is closed")) }
        link.flushesLeft = volumes.count
        let (remote, session) = (remote, link.state.session)
        for volume in volumes {
            world.later { [unowned self] in
                guard remote.isUp, remote.session == session, world.reaches(self, remote) else { return breaks(link) }
                remote.flush(volume)
                bring(link) { [unowned self] in
                    link.flushesLeft -= 1
                    if link.flushesLeft == 0 { handle(.move(.flushed)) }
                }
            }
        }
    }

    /// The remote's process, or its session, has ended.
    func peerClosed() { if let link { breaks(link) } }
}
