//! One GPU: a stream, and memory on the device for what is on its way.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{
    CudaContext, DriverError,
    result::{self, stream::StreamKind},
    sys,
};

use crate::CollectiveError;

/// Memory on the device grows by whole pieces of this size, so that few calls find too little.
const GRAIN_BYTES: usize = 1 << 20;

pub(super) struct Device {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    outbox: Buffer,
    inbox: Buffer,
}

/// Memory on the device; what it holds is of no interest between calls.
#[derive(Default)]
struct Buffer {
    address: sys::CUdeviceptr,
    bytes: usize,
}

// SAFETY: stream and addresses are the driver's names for things, and mean the same on all threads once the
// context is bound, which each call does.
unsafe impl Send for Device {}

// === impl Device ===

impl Device {
    /// libcuda is there: cudarc panics otherwise.
    pub(super) fn open(ordinal: usize) -> Result<Self, CollectiveError> {
        let failed = |error: DriverError| {
            let devices = CudaContext::device_count().map_or(0, |count| count);
            let reason = format!("device {ordinal} of {devices} cannot be opened: {}", words(&error));
            CollectiveError::Device { reason }
        };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        // Of its own: the default stream waits for whatever else the process does on the device.
        let stream = result::stream::create(StreamKind::NonBlocking).map_err(failed)?;
        Ok(Self { context, stream, outbox: Buffer::default(), inbox: Buffer::default() })
    }

    /// For the calling thread, and for NCCL in it.
    pub(super) fn bind(&self) -> Result<(), CollectiveError> {
        self.context.bind_to_thread().map_err(failed)
    }

    pub(super) fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Room for so many bytes on their way out and in. The stream is idle.
    pub(super) fn make_room(&mut self, out: usize, inward: usize) -> Result<(), CollectiveError> {
        self.outbox.grow(out)?;
        self.inbox.grow(inward)
    }

    /// Copies to the outbox, in the order of the stream.
    pub(super) fn upload(&mut self, at: usize, bytes: &[u8]) -> Result<(), CollectiveError> {
        if bytes.is_empty() {
            return Ok(());
        }
        assert!(at + bytes.len() <= self.outbox.bytes, "room was made");
        // SAFETY: the place is within the outbox. The driver has read ordinary memory when this returns.
        unsafe { result::memcpy_htod_async(self.outbox.address + at as u64, bytes, self.stream) }
            .map_err(failed)
    }

    /// Copies from the inbox. The stream is idle, so it does not wait for a peer.
    pub(super) fn download(&self, at: usize, bytes: &mut [u8]) -> Result<(), CollectiveError> {
        if bytes.is_empty() {
            return Ok(());
        }
        assert!(at + bytes.len() <= self.inbox.bytes, "room was made");
        // SAFETY: the place is within the inbox, and the stream is waited for before anybody looks at `bytes`.
        unsafe {
            result::memcpy_dtoh_async(bytes, self.inbox.address + at as u64, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        }
        .map_err(failed)
    }

    pub(super) fn outbox(&self, at: usize) -> u64 {
        self.outbox.address + at as u64
    }

    pub(super) fn inbox(&self, at: usize) -> u64 {
        self.inbox.address + at as u64
    }

    /// Whether all that was put on its own stream is done.
    pub(super) fn is_idle(&self) -> Result<bool, CollectiveError> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { self.is_done(self.stream()) }
    }

    /// Whether all that was put on a stream is done.
    ///
    /// # Safety
    /// The stream is one of this device's primary context.
    pub(super) unsafe fn is_done(&self, stream: *mut c_void) -> Result<bool, CollectiveError> {
        // SAFETY: the caller's.
        match unsafe { sys::cuStreamQuery(stream.cast()) } {
            sys::cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(failed),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Behind a transfer that hangs in spite of an abort, freeing would wait for ever: then the memory stays where it is
        // until the process ends. Failures have no one to be told to.
        if self.bind().is_ok() && self.is_idle().is_ok_and(|idle| idle) {
            self.outbox.free().ok();
            self.inbox.free().ok();
        }
        // SAFETY: nobody uses it after this; the driver waits for no work on it here.
        unsafe { result::stream::destroy(self.stream) }.ok();
    }
}

// === impl Buffer ===

impl Buffer {
    fn grow(&mut self, bytes: usize) -> Result<(), CollectiveError> {
        if self.bytes >= bytes {
            return Ok(());
        }
        self.free()?;
        let bytes = bytes.next_multiple_of(GRAIN_BYTES);
        // Not from a pool: NCCL reads a peer's memory directly where both are in one process, and pools forbid that.
        // SAFETY: the memory is written before it is read.
        self.address = unsafe { result::malloc_sync(bytes) }.map_err(|error| CollectiveError::Device {
            reason: format!("{bytes} bytes of the device's memory are not to be had: {}", words(&error)),
        })?;
        self.bytes = bytes;
        Ok(())
    }

    fn free(&mut self) -> Result<(), CollectiveError> {
        let former = std::mem::take(self);
        if former.bytes == 0 {
            return Ok(());
        }
        // SAFETY: it was allocated here, is freed once, and the stream that used it is idle.
        unsafe { result::free_sync(former.address) }.map_err(failed)
    }
}

fn failed(error: DriverError) -> CollectiveError {
    CollectiveError::Device { reason: words(&error) }
}

/// What the driver calls it.
fn words(error: &DriverError) -> String {
    let word = error.error_string().map(|text| text.to_string_lossy().into_owned());
    format!("CUDA says {} ({:?})", word.unwrap_or_else(|_| "nothing".to_owned()), error.0)
}
