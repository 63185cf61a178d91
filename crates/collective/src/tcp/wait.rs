//! Sleeping until a connection can go on.

use std::{os::fd::RawFd, time::Duration};

/// A connection, and whether one wants to write to it or to read from it.
pub(super) struct Interest {
    pub(super) file: RawFd,
    pub(super) writes: bool,
}

/// Until one of them can go on, is closed, or time is up. May return early: whoever waits looks again.
pub(super) fn wait(interests: &[Interest], left: Duration) {
    let mut polled: Vec<libc::pollfd> = interests
        .iter()
        .map(|interest| libc::pollfd {
            fd: interest.file,
            events: if interest.writes { libc::POLLOUT } else { libc::POLLIN },
            revents: 0,
        })
        .collect();
    // Rounded up: a wait of zero would spin.
    let milliseconds = left.as_millis().saturating_add(1).min(i32::MAX as u128) as libc::c_int;
    // Safety: `polled` holds as many entries as it says. An error, such as a signal, is an early return.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds) };
}
