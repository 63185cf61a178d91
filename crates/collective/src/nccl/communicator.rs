//! One rank's communicator: made, polled, and aborted once, whoever is first to have a reason.

use std::{
    ffi::{c_int, c_void},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::library::{BYTES, Config, IN_PROGRESS, Library, NcclId, Raw, SUCCESS};
use crate::{CollectiveError, Parcel};

/// A rank that leaves lets NCCL finish what it has begun, which needs the others to leave too, for so long at most.
const LEAVE_WAIT: Duration = Duration::from_millis(200);
const LEAVE_NAP: Duration = Duration::from_micros(200);

/// Shared by a rank and its aborters.
pub(super) struct Communicator {
    library: &'static Library,
    state: Mutex<State>,
}

struct State {
    /// `None`: not made yet, or aborted.
    raw: Option<Alive>,
    /// The first failure, which is every later one too.
    failure: Option<CollectiveError>,
}

struct Alive(Raw);

// SAFETY: NCCL allows its functions from any thread, one at a time, which the lock sees to.
unsafe impl Send for Alive {}

/// Why a step of a communicator was the last one.
pub(super) enum Trouble {
    /// The group was over before.
    Over(CollectiveError),
    /// NCCL says so.
    Nccl { code: c_int, sentence: String },
}

// === impl Communicator ===

impl Communicator {
    pub(super) fn new(library: &'static Library) -> Self {
        Self { library, state: Mutex::new(State { raw: None, failure: None }) }
    }

    /// Begins to join; [`Communicator::is_settled`] says when all ranks are there. The device is bound to this thread.
    pub(super) fn begin(&self, id: &NcclId, rank: usize, size: usize) -> Result<(), Trouble> {
        let mut state = self.state.lock();
        state.check()?;
        let mut raw: Raw = std::ptr::null_mut();
        let (size, rank) = (size as c_int, rank as c_int);
        // SAFETY: there is room for the answer; the configuration is read before the call returns.
        let code = unsafe {
            (self.library.init_rank_config)(&mut raw, size, *id, rank, &mut Config::non_blocking())
        };
        if !raw.is_null() {
            state.raw = Some(Alive(raw));
        }
        self.judge(code, &state)
    }

    /// Whether what was begun has been taken over by the device, or for [`Communicator::begin`], has been done.
    pub(super) fn is_settled(&self) -> Result<bool, Trouble> {
        let state = self.state.lock();
        let raw = state.alive()?;
        let mut status = SUCCESS;
        // SAFETY: the communicator is alive while the lock is held, and there is room for the answer.
        let code = unsafe { (self.library.get_async_error)(raw, &mut status) };
        self.judge(code, &state)?;
        self.judge(status, &state)?;
        Ok(status != IN_PROGRESS)
    }

    /// Puts all of these on the stream, as one.
    ///
    /// # Safety
    /// The pieces and the stream are of this communicator's device, and stay until the stream is idle.
    pub(super) unsafe fn launch(
        &self,
        outgoing: &[Parcel],
        incoming: &[Parcel],
        stream: *mut c_void,
    ) -> Result<(), Trouble> {
        let state = self.state.lock();
        let raw = state.alive()?;
        let Library { group_start, group_end, send, recv, .. } = self.library;
        // SAFETY: the communicator is alive while the lock is held; the pieces are as the caller says.
        unsafe {
            self.judge(group_start(), &state)?;
            let mut begun = Ok(());
            for Parcel { peer, address, bytes } in outgoing {
                let code = send(*address as *const c_void, *bytes, BYTES, *peer as c_int, raw, stream);
                begun = begun.and(self.judge(code, &state));
            }
            for Parcel { peer, address, bytes } in incoming {
                let code = recv(*address as *mut c_void, *bytes, BYTES, *peer as c_int, raw, stream);
                begun = begun.and(self.judge(code, &state));
            }
            // Ended in any case: the next group of this thread is another one.
            let ended = group_end();
            begun.and(self.judge(ended, &state))
        }
    }

    /// Remembers the first failure, and aborts the communicator.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let mut state = self.state.lock();
        let error = state.failure.get_or_insert(error).clone();
        self.abort(&mut state);
        error
    }

    pub(super) fn failure(&self) -> Option<CollectiveError> {
        self.state.lock().failure.clone()
    }

    /// Leaves a group that has not failed, so that nothing of the last call is taken back from the others.
    pub(super) fn leave(&self) {
        let mut state = self.state.lock();
        let Some(Alive(raw)) = &state.raw else { return };
        let deadline = Instant::now() + LEAVE_WAIT;
        // SAFETY: alive while the lock is held. After `destroy` nobody has it any more.
        unsafe {
            let mut status = (self.library.finalize)(*raw);
            while status == IN_PROGRESS && Instant::now() < deadline {
                std::thread::sleep(LEAVE_NAP);
                let code = (self.library.get_async_error)(*raw, &mut status);
                status = if code == SUCCESS { status } else { code };
            }
            if status == SUCCESS {
                (self.library.destroy)(*raw);
                state.raw = None;
            }
        }
        self.abort(&mut state);
    }

    fn abort(&self, state: &mut State) {
        let Some(Alive(raw)) = state.raw.take() else { return };
        // SAFETY: alive until now, and taken: nobody has it any more. That it cannot be aborted leaves nothing to be done.
        unsafe { (self.library.abort)(raw) };
    }

    /// A result that is no failure.
    fn judge(&self, code: c_int, state: &State) -> Result<(), Trouble> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let raw = state.raw.as_ref().map(|alive| alive.0);
        Err(Trouble::Nccl { code, sentence: self.library.sentence(code, raw) })
    }
}

// === impl State ===

impl State {
    fn check(&self) -> Result<(), Trouble> {
        self.failure.clone().map_or(Ok(()), |failure| Err(Trouble::Over(failure)))
    }

    fn alive(&self) -> Result<Raw, Trouble> {
        self.check()?;
        let none = || CollectiveError::Aborted { reason: "it left the group".to_owned() };
        self.raw.as_ref().map(|alive| alive.0).ok_or_else(|| Trouble::Over(none()))
    }
}
