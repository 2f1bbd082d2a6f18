// TLSCredentials.swift: certificates and keys of a site, in the layout that qemu, nbdkit and libnbd share.
//
//   directory/ca-cert.pem      whom to trust; with client verification, whose clients to accept
//   directory/ca-crl.pem       certificates withdrawn (optional)
//   directory/server-cert.pem  the site's certificate, and
//   directory/server-key.pem   its key
//   directory/client-cert.pem, client-key.pem   for the replicator's link, read by libnbd
//   a PSK file: "user:hexadecimal key" lines, as psktool writes them
//
// Source: qemu docs/system/tls.rst; nbdkit-tls(1); libnbd's nbd_set_tls_certificates(3).

import CGnuTLS
import Glibc

package struct TLSError: Error, CustomStringConvertible {
    package let description: String

    init(_ description: String) { self.description = description }

    init(_ attempt: String, code: Int32) {
        self.description = "\(attempt): \(String(cString: gnutls_strerror(code)))"
    }
}

/// What a site configured about TLS.
package struct TLSFiles: Sendable, Equatable {
    /// Directory of certificates.
    package var certificates: String?
    package var pskFile: String?
    /// Whether clients must show a certificate that the authority signed.
    package var verifyPeer: Bool

    package init(certificates: String?, pskFile: String?, verifyPeer: Bool) {
        self.certificates = certificates
        self.pskFile = pskFile
        self.verifyPeer = verifyPeer
    }

    package var isEmpty: Bool { certificates == nil && pskFile == nil }
}

package final class TLSCredentials: @unchecked Sendable {
    // Safe because: everything is set at init and only read by sessions afterwards; GnuTLS allows that from many threads.
    fileprivate let certificate: gnutls_certificate_credentials_t?
    fileprivate let psk: gnutls_psk_server_credentials_t?
    fileprivate let priority: gnutls_priority_t
    fileprivate let verifyPeer: Bool

    /// - Throws: `TLSError` naming the file that is missing or wrong.
    package init(_ files: TLSFiles) throws(TLSError) {
        certificate = try files.certificates.map(Self.loadCertificates)
        psk = try files.pskFile.map(Self.loadPSK)
        verifyPeer = files.verifyPeer
        guard certificate != nil || psk != nil else {
            throw TLSError("TLS needs certificates or a PSK file")
        }
        let text =
            "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2" + (psk == nil ? "" : ":+ECDHE-PSK:+DHE-PSK:+PSK")
        var priority: gnutls_priority_t?
        let result = gnutls_priority_init(&priority, text, nil)
        guard result == 0, let priority else { throw TLSError("set the TLS versions", code: result) }
        self.priority = priority
    }

    deinit {
        if let certificate { gnutls_certificate_free_credentials(certificate) }
        if let psk { gnutls_psk_free_server_credentials(psk) }
        gnutls_priority_deinit(priority)
    }

    private static func loadCertificates(_ directory: String) throws(TLSError) -> gnutls_certificate_credentials_t {
        var made: gnutls_certificate_credentials_t?
        guard gnutls_certificate_allocate_credentials(&made) == 0, let credentials = made else {
            throw TLSError("no memory for certificates")
        }
        var loaded = false
        defer { if !loaded { gnutls_certificate_free_credentials(credentials) } }
        let authority = "\(directory)/ca-cert.pem"
        let count = gnutls_certificate_set_x509_trust_file(credentials, authority, GNUTLS_X509_FMT_PEM)
        if count <= 0 { throw TLSError("read \(authority)", code: count == 0 ? -64 : count) }
        let withdrawn = "\(directory)/ca-crl.pem"
        if access(withdrawn, F_OK) == 0 {
            let result = gnutls_certificate_set_x509_crl_file(credentials, withdrawn, GNUTLS_X509_FMT_PEM)
            if result < 0 { throw TLSError("read \(withdrawn)", code: result) }
        }
        let (own, key) = ("\(directory)/server-cert.pem", "\(directory)/server-key.pem")
        let result = gnutls_certificate_set_x509_key_file(credentials, own, key, GNUTLS_X509_FMT_PEM)
        if result < 0 { throw TLSError("read \(own) and \(key)", code: result) }
        gnutls_certificate_set_known_dh_params(credentials, GNUTLS_SEC_PARAM_MEDIUM)
        loaded = true
        return credentials
    }

    private static func loadPSK(_ path: String) throws(TLSError) -> gnutls_psk_server_credentials_t {
        guard access(path, R_OK) == 0 else {
            throw TLSError("read \(path): \(String(cString: strerror(errno)))")
        }
        var made: gnutls_psk_server_credentials_t?
        guard gnutls_psk_allocate_server_credentials(&made) == 0, let credentials = made else {
            throw TLSError("no memory for a PSK file")
        }
        let result = gnutls_psk_set_server_credentials_file(credentials, path)
        if result < 0 {
            gnutls_psk_free_server_credentials(credentials)
            throw TLSError("read \(path)", code: result)
        }
        gnutls_psk_set_server_known_dh_params(credentials, GNUTLS_SEC_PARAM_MEDIUM)
        return credentials
    }
}

/// The server's side of one TLS connection over a non-blocking socket. A plain handle: its owner frees it, and one thread
/// at a time uses it.
package struct TLSSession: @unchecked Sendable {
    // Safe because: GnuTLS sessions may move between threads as long as one at a time uses them.
    private let session: gnutls_session_t

    /// What a call came to.
    package enum Outcome: Equatable {
        case done
        /// Call again when the socket can be read, or written.
        case wantsRead
        case wantsWrite
        case failed(String)
    }

    /// - Parameter socket: stays the caller's, and must not block.
    package init(_ credentials: TLSCredentials, socket: Int32) throws(TLSError) {
        var made: gnutls_session_t?
        let result = farcopy_tls_init_server(&made)
        guard result == 0, let made else { throw TLSError("begin TLS", code: result) }
        session = made
        gnutls_priority_set(session, credentials.priority)
        if let certificate = credentials.certificate {
            gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, UnsafeMutableRawPointer(certificate))
            if credentials.verifyPeer {
                gnutls_certificate_server_set_request(session, GNUTLS_CERT_REQUIRE)
                gnutls_session_set_verify_cert(session, nil, 0)
            }
        }
        if let psk = credentials.psk {
            gnutls_credentials_set(session, GNUTLS_CRD_PSK, UnsafeMutableRawPointer(psk))
        }
        gnutls_transport_set_int2(session, socket, socket)
    }

    package func free() { gnutls_deinit(session) }

    /// Moves the handshake on.
    package func handshake() -> Outcome {
        for _ in 0..<32 {
            let result = gnutls_handshake(session)
            if result == 0 { return .done }
            if result == farcopy_tls_again {
                return gnutls_record_get_direction(session) == 0 ? .wantsRead : .wantsWrite
            }
            if result == farcopy_tls_interrupted { continue }
            if gnutls_error_is_fatal(result) != 0 { return .failed(String(cString: gnutls_strerror(result))) }
        }
        return .failed("too many alerts")
    }

    /// Who the client has proved to be: its certificate's common name, or its PSK user; nil when it proved nothing.
    package var identity: String? {
        if let user = gnutls_psk_server_get_username(session) { return String(cString: user) }
        var count: UInt32 = 0
        guard let chain = gnutls_certificate_get_peers(session, &count), count > 0 else { return nil }
        var made: gnutls_x509_crt_t?
        guard gnutls_x509_crt_init(&made) == 0, let certificate = made else { return nil }
        defer { gnutls_x509_crt_deinit(certificate) }
        guard gnutls_x509_crt_import(certificate, chain, GNUTLS_X509_FMT_DER) == 0 else { return nil }
        var name = [CChar](repeating: 0, count: 256)
        var size = name.count
        // The object identifier of commonName (RFC 5280, appendix A.1).
        guard gnutls_x509_crt_get_dn_by_oid(certificate, "2.5.4.3", 0, 0, &name, &size) == 0 else { return nil }
        let bytes = name.prefix(size).map { UInt8(bitPattern: $0) }
        // A name with a NUL in it could be taken for a shorter one.
        return bytes.contains(0) ? nil : String(validating: bytes, as: UTF8.self)
    }

    /// Bytes received, 0 at the client's end, or -1 with `errno` as `recv` would set it.
    package func receive(_ buffer: UnsafeMutableRawPointer, _ count: Int) -> Int {
        let result = gnutls_record_recv(session, buffer, count)
        if result >= 0 { return result }
        switch Int32(result) {
        case farcopy_tls_again: errno = EAGAIN
        case farcopy_tls_interrupted: errno = EINTR
        // The reply is a connection that ends without its farewell; no request is cut off by it unnoticed.
        case farcopy_tls_premature_termination: return 0
        default: errno = gnutls_error_is_fatal(Int32(result)) != 0 ? EPROTO : EINTR
        }
        return -1
    }

    /// Bytes sent as one record, or -1 with `errno` as `send` would set it. After EAGAIN the same bytes come again.
    package func send(_ buffer: UnsafeRawPointer, _ count: Int) -> Int {
        let result = gnutls_record_send(session, buffer, count)
        if result >= 0 { return result }
        switch Int32(result) {
        case farcopy_tls_again: errno = EAGAIN
        case farcopy_tls_interrupted: errno = EINTR
        default: errno = EPROTO
        }
        return -1
    }

    /// The farewell, if the socket takes it at once.
    package func farewell() { gnutls_bye(session, GNUTLS_SHUT_WR) }

    /// Bytes that one record holds.
    package static let recordByteCount = 16384
}
