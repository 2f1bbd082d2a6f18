#pragma once
#include <linux/nbd-netlink.h>
#include <netlink/genl/ctrl.h>
#include <netlink/genl/genl.h>
#include <netlink/netlink.h>
#include <sys/prctl.h>

// The kernel may need this process to write memory back, so it must not wait for that itself (PR_SET_IO_FLUSHER).
static inline void farcopy_keep_out_of_reclaim(void) { prctl(57, 1, 0, 0, 0); }
