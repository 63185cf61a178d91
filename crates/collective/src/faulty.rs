//! A rank with bad luck: around any other, by a schedule that a test can repeat.

use std::{collections::BTreeMap, ffi::c_void, ops::Range, sync::Arc, time::Duration};

use crate::{Aborter, Collective, CollectiveError, OnDevice, Parcel};

/// What befalls one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It comes so much later. Below the group's timeout that changes nothing.
    Delay(Duration),
    /// The rank loses its calls' messages from here on, as if its network were unplugged: it takes part in nothing and
    /// hears nothing.
    Silence,
    /// Another thread aborts it.
    Abort,
    /// The rank is gone: its process has died.
    Death,
}

/// How often a call in a thousand meets what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub delayed_permille: u32,
    pub delay_max: Duration,
    pub silenced_permille: u32,
    pub aborted_permille: u32,
}

/// Which calls meet which faults; calls are counted from 0.
#[derive(Clone, Debug)]
pub enum Schedule {
    At(BTreeMap<u64, Fault>),
    /// A function of seed, rank and call.
    Seeded {
        seed: u64,
        rates: Rates,
    },
}

/// A rank to which things happen.
pub struct Faulty {
    /// `None`: dead.
    inner: Option<Box<dyn Collective>>,
    rank: usize,
    size: usize,
    epoch: u64,
    has_device: bool,
    timeout: Duration,
    schedule: Schedule,
    calls: u64,
    failure: Option<CollectiveError>,
}

// === impl Schedule ===

impl Schedule {
    /// One fault, at one call.
    pub fn once(call: u64, fault: Fault) -> Self {
        Self::At(BTreeMap::from([(call, fault)]))
    }

    fn fault(&self, rank: usize, call: u64) -> Option<Fault> {
        let (seed, rates) = match self {
            Self::At(faults) => return faults.get(&call).copied(),
            Self::Seeded { seed, rates } => (seed, rates),
        };
        let word = mix(seed ^ mix(rank as u64 ^ mix(call)));
        let (draw, part) = ((word % 1000) as u32, (word >> 32) as u32);
        let silenced = rates.silenced_permille;
        let aborted = silenced + rates.aborted_permille;
        match draw {
            _ if draw < silenced => Some(Fault::Silence),
            _ if draw < aborted => Some(Fault::Abort),
            _ if draw < aborted + rates.delayed_permille => {
                Some(Fault::Delay(rates.delay_max.mul_f64(f64::from(part) / f64::from(u32::MAX))))
            }
            _ => None,
        }
    }
}

/// SplitMix64.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

// === impl Faulty ===

impl Faulty {
    /// `timeout`: the group's, which a silenced rank waits for in vain.
    pub fn new(mut inner: Box<dyn Collective>, timeout: Duration, schedule: Schedule) -> Self {
        let (rank, size, epoch) = (inner.rank(), inner.size(), inner.epoch());
        let has_device = inner.on_device().is_some();
        Self { inner: Some(inner), rank, size, epoch, has_device, timeout, schedule, calls: 0, failure: None }
    }

    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Collective) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let fault = self.schedule.fault(self.rank, self.calls);
        self.calls += 1;
        let inner = self.inner.as_mut().expect("a rank that is gone has failed");
        match fault {
            None => {}
            Some(Fault::Delay(delay)) => std::thread::sleep(delay),
            Some(Fault::Abort) => inner.aborter().abort("by schedule"),
            Some(Fault::Silence) => {
                std::thread::sleep(self.timeout);
                inner.aborter().abort("nothing was heard within the timeout");
            }
            Some(Fault::Death) => {
                self.inner = None;
                let gone = CollectiveError::Aborted { reason: "this rank has died".to_owned() };
                return Err(self.failure.insert(gone).clone());
            }
        }
        call(&mut **inner).inspect_err(|error| {
            if !matches!(error, CollectiveError::Invalid { .. }) {
                self.failure = Some(error.clone());
            }
        })
    }
}

impl Collective for Faulty {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn aborter(&self) -> Aborter {
        // Of a dead rank there is nothing left to abort.
        self.inner.as_ref().map_or_else(|| Aborter(Arc::new(|_| ())), |inner| inner.aborter())
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.all_reduce_sum(values))
    }

    fn all_gather_among(
        &mut self,
        members: Range<usize>,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.call(|inner| inner.all_gather_among(members, own, counts, all))
    }

    fn reduce_scatter_sum(&mut self, values: &[f32], own: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.reduce_scatter_sum(values, own))
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.broadcast(root, values))
    }

    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.send(to, values))
    }

    fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(|inner| inner.recv(from, values))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call(|inner| inner.barrier())
    }

    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        self.has_device.then_some(self as &mut dyn OnDevice)
    }
}

impl OnDevice for Faulty {
    unsafe fn transfer(
        &mut self,
        stream: *mut c_void,
        outgoing: &[Parcel],
        incoming: &[Parcel],
    ) -> Result<(), CollectiveError> {
        // SAFETY: the caller's.
        self.call(|inner| unsafe { device_of(inner).transfer(stream, outgoing, incoming) })
    }

    unsafe fn drain(&mut self, stream: *mut c_void) -> Result<(), CollectiveError> {
        // SAFETY: the caller's.
        self.call(|inner| unsafe { device_of(inner).drain(stream) })
    }
}

fn device_of(inner: &mut dyn Collective) -> &mut dyn OnDevice {
    inner.on_device().expect("a group that had devices when it was made")
}
