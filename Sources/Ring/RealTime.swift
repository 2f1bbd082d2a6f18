// RealTime.swift: the time of day, for people and records. Nothing is measured with it.

import CLibURing
import Glibc

/// Seconds since 1970.
package func realSeconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}
