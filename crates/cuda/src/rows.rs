//! Rows that leave the model: copies of kept ones, each in memory of its own until a lane has sent it.

use std::mem;
use std::sync::mpsc;

use uniarm_model::ModelError;

use crate::device::Device;
use crate::memory::Memory;

/// Memory for rows of one length. It grows to the largest use seen: lanes bound how many rows are on their way.
pub(crate) struct Stock {
    returned: mpsc::Receiver<Memory<f32>>,
    back: mpsc::Sender<Memory<f32>>,
}

/// A copy of a row. Its memory goes back to the stock that it is from.
pub(crate) struct CudaRow {
    memory: Option<Memory<f32>>,
    back: mpsc::Sender<Memory<f32>>,
}

// === impl Stock ===

impl Stock {
    pub fn new() -> Self {
        let (back, returned) = mpsc::channel();
        Self { returned, back }
    }

    /// Memory for a row of so many numbers, which is as long as all others.
    pub fn take(&self, device: &Device, numbers: usize) -> Result<CudaRow, ModelError> {
        let memory = match self.returned.try_recv() {
            Ok(memory) => memory,
            Err(_) => Memory::reserve(device, numbers, "a row on its way")?,
        };
        Ok(CudaRow { memory: Some(memory), back: self.back.clone() })
    }
}

// === impl CudaRow ===

impl CudaRow {
    pub fn memory(&self) -> &Memory<f32> {
        self.memory.as_ref().expect("it goes back when the row is dropped")
    }

    pub fn memory_mut(&mut self) -> &mut Memory<f32> {
        self.memory.as_mut().expect("it goes back when the row is dropped")
    }

    /// Leaves the memory where it is until the process ends: a transfer that hangs may still read it.
    pub fn abandon(mut self) {
        mem::forget(self.memory.take());
    }
}

impl Drop for CudaRow {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The model may be gone: then nobody wants it back, and it is given back to the device.
            let _ = self.back.send(memory);
        }
    }
}
