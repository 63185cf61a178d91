//! Memory of the host whose pages are locked: the device reads and writes it by itself, in the order of the stream. From other
//! memory the driver copies first, and waits for what the stream has before.

use std::marker::PhantomData;
use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr, DriverError, ValidAsZeroBits, result};
use uniarm_model::ModelError;

use crate::device::{is_idle_soon, refused};

/// Memory that grows to the largest use seen, and loses what it holds when it grows: pages take longer to lock than to copy.
pub(crate) struct Locked<T> {
    pages: Option<Pages>,
    numbers: PhantomData<T>,
}

struct Pages {
    /// Whose copies they are for.
    stream: Arc<CudaStream>,
    address: *mut u8,
    bytes: usize,
}

/// Safety: nobody else has the address; the driver takes it back on any thread.
unsafe impl Send for Pages {}

// === impl Locked ===

impl<T: DeviceRepr + ValidAsZeroBits> Locked<T> {
    pub const fn new() -> Self {
        Self { pages: None, numbers: PhantomData }
    }

    /// Room for `count` numbers, of any content, and for copies on this stream. Copies of what is here have to be done.
    pub fn reserve(&mut self, stream: &Arc<CudaStream>, count: usize) -> Result<&mut [T], ModelError> {
        let bytes = count * size_of::<T>();
        if self.pages.as_ref().is_none_or(|pages| pages.bytes < bytes) {
            self.pages = None;
            self.pages = Some(Pages::lock(stream, bytes.max(1).next_power_of_two())?);
        }
        let pages = self.pages.as_mut().expect("pages that were locked");
        // Safety: they are so many bytes at least, at the beginning of a page; zeros, or what a T was copied to.
        Ok(unsafe { slice::from_raw_parts_mut(pages.address.cast(), count) })
    }

    /// The first numbers of a room for as many.
    pub fn numbers(&self, count: usize) -> &[T] {
        let pages = self.pages.as_ref().filter(|pages| count * size_of::<T>() <= pages.bytes);
        let pages = pages.expect("pages that were locked for so many");
        // Safety: as above.
        unsafe { slice::from_raw_parts(pages.address.cast(), count) }
    }
}

// === impl Pages ===

impl Pages {
    fn lock(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self, ModelError> {
        let locked = stream.context().bind_to_thread().and_then(|()| {
            // Safety: the context is this thread's, and the driver gives so many bytes or none.
            unsafe {
                let address: *mut u8 = result::malloc_host(bytes, 0)?.cast();
                address.write_bytes(0, bytes);
                Ok::<_, DriverError>(address)
            }
        });
        let address = locked.map_err(|error| refused(&format!("{bytes} bytes of locked memory"), error))?;
        Ok(Self { stream: Arc::clone(stream), address, bytes })
    }
}

impl Drop for Pages {
    /// The driver takes them back when the stream has nothing left to do. Behind a transfer that hangs, they stay until the process ends.
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_err() {
            return;
        }
        if is_idle_soon(&self.stream) {
            // Safety: the driver gave this address, and no copy is under way. What it says of that, nobody can mend.
            let _ = unsafe { result::free_host(self.address.cast()) };
        }
    }
}
