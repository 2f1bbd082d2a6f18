#pragma once
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <gnutls/crypto.h>

// Defined as macros or with types that Swift does not take.
static const int farcopy_tls_again = GNUTLS_E_AGAIN;
static const int farcopy_tls_interrupted = GNUTLS_E_INTERRUPTED;
static const int farcopy_tls_premature_termination = GNUTLS_E_PREMATURE_TERMINATION;
static inline int farcopy_tls_init_server(gnutls_session_t *session) {
    return gnutls_init(session, GNUTLS_SERVER | GNUTLS_NONBLOCK);
}
