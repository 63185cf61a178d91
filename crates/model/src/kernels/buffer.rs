//! A growable, zeroed array of f32 whose start lies on a cache line.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A cache line, and the width of the widest vector.
const ALIGNMENT: usize = 64;

/// Fresh memory comes zeroed from the operating system, so a cache that is never filled costs nothing.
pub struct Buffer {
    start: NonNull<f32>,
    len: usize,
}

// Safety: it owns its memory, as a `Vec<f32>` does.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    pub const fn new() -> Self {
        Self { start: NonNull::dangling(), len: 0 }
    }

    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::new();
        }
        let layout = Self::layout(len);
        // Safety: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start.cast()) else { handle_alloc_error(layout) };
        Self { start, len }
    }

    /// Makes room for `len` floats. Their values are not kept: a workspace is written before it is read.
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len.next_multiple_of(1024));
        }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<f32>()).expect("fewer floats than fit the address space");
        Layout::from_size_align(bytes, ALIGNMENT).expect("fewer bytes than fit the address space")
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // Safety: `len` initialised floats, or a dangling pointer and none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // Safety: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // Safety: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}
