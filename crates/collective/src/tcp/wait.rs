//! Sleeping until a connection can go on.

use std::{os::fd::RawFd, time::Duration};

use super::Sign;

/// The other end is closed. Where the kernel tells of it only to those who read, it is noticed when they do.
#[cfg(target_os = "linux")]
const GONE: libc::c_short = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
#[cfg(not(target_os = "linux"))]
const GONE: libc::c_short = libc::POLLHUP | libc::POLLERR;

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

/// What can be seen of each connection at once, without waiting and without reading.
pub(super) fn look(files: &[RawFd]) -> Vec<Option<Sign>> {
    let mut polled: Vec<libc::pollfd> = files
        .iter()
        .map(|file| libc::pollfd { fd: *file, events: libc::POLLIN | GONE, revents: 0 })
        .collect();
    // Safety: as in `wait`. An error leaves nothing seen, and whoever looks looks again.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) };
    let sign = |polled: &libc::pollfd| match polled.revents {
        0 => None,
        seen if seen & GONE != 0 => Some(Sign::Gone),
        _ => Some(Sign::Speaks),
    };
    polled.iter().map(sign).collect()
}
