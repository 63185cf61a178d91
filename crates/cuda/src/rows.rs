//! Rows that leave the model: copies of kept ones, each in memory of its own until a lane has sent it.

use std::mem;
use std::sync::{Arc, mpsc};

use cudarc::driver::{CudaContext, result};
use uniarm_model::ModelError;

use crate::device::{Device, refused};

/// Numbers on a device, outside of the driver's pools: NCCL lets ranks that are threads of one process read each other's
/// memory, which pools forbid.
pub(crate) struct RowMemory {
    context: Arc<CudaContext>,
    address: u64,
    numbers: usize,
}

/// Memory for rows of one length. It grows to the largest use seen: lanes bound how many rows are on their way.
pub(crate) struct Stock {
    returned: mpsc::Receiver<RowMemory>,
    back: mpsc::Sender<RowMemory>,
}

/// A copy of a row. Its memory goes back to the stock that it is from.
pub(crate) struct CudaRow {
    memory: Option<RowMemory>,
    back: mpsc::Sender<RowMemory>,
}

// === impl RowMemory ===

impl RowMemory {
    pub fn reserve(context: &Arc<CudaContext>, numbers: usize) -> Result<Self, ModelError> {
        let bytes = numbers.max(1) * size_of::<f32>();
        let reserved = context.bind_to_thread().and_then(|()| {
            // Safety: the context is this thread's; who reads has written before.
            unsafe { result::malloc_sync(bytes) }
        });
        let address =
            reserved.map_err(|error| refused(&format!("{bytes} bytes for rows on their way"), error))?;
        Ok(Self { context: Arc::clone(context), address, numbers })
    }

    pub fn numbers(&self) -> usize {
        self.numbers
    }

    /// Where number `index` lies.
    pub fn at(&self, index: usize) -> u64 {
        debug_assert!(index <= self.numbers);
        self.address + (index * size_of::<f32>()) as u64
    }
}

impl Drop for RowMemory {
    /// Whoever had it is done with it.
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // Safety: it was reserved here, and is freed once. What the driver says of that, nobody can mend.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
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
            Err(_) => RowMemory::reserve(device.stream().context(), numbers)?,
        };
        Ok(CudaRow { memory: Some(memory), back: self.back.clone() })
    }
}

// === impl CudaRow ===

impl CudaRow {
    pub fn memory(&self) -> &RowMemory {
        self.memory.as_ref().expect("it goes back when the row is dropped")
    }

    /// Leaves the memory where it is until the process ends: a transfer that hangs may still read it.
    pub fn abandon(mut self) {
        mem::forget(self.memory.take());
    }
}

impl Drop for CudaRow {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The model may be gone: then nobody wants it back, and it is freed here.
            let _ = self.back.send(memory);
        }
    }
}
