//! Memory of the device.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr as _, DeviceRepr, ValidAsZeroBits};
use uniarm_model::ModelError;

use crate::device::{Device, refused};

/// Numbers on the device, whose address kernels get.
pub(crate) struct Memory<T> {
    numbers: CudaSlice<T>,
    address: u64,
}

/// Memory that grows to the largest use seen, and loses what it holds when it grows.
pub(crate) struct Growing<T> {
    memory: Option<Memory<T>>,
}

impl<T: DeviceRepr + ValidAsZeroBits> Memory<T> {
    /// Memory of any content, for `what`, which an error names.
    pub fn reserve(device: &Device, count: usize, what: &str) -> Result<Self, ModelError> {
        Self::reserve_on(device.stream(), count, what)
    }

    /// The same for work on this stream, in whose order it is given back.
    pub fn reserve_on(stream: &Arc<CudaStream>, count: usize, what: &str) -> Result<Self, ModelError> {
        // Safety: a driver has no memory of no bytes, so there is one number at least; who reads has written before.
        let numbers = unsafe { stream.alloc(count.max(1)) }.map_err(|error| {
            let free = stream.context().mem_get_info().map_or(0, |(free, _)| free);
            let bytes = count * size_of::<T>();
            ModelError::Device(format!(
                "no room for {what}: {bytes} bytes of {free} that are free ({error}). Take a smaller model, fewer cache \
                 blocks, or a device that nobody else uses"
            ))
        })?;
        let (address, _) = numbers.device_ptr(stream);
        Ok(Self { address, numbers })
    }

    pub fn of(device: &Device, numbers: &[T], what: &str) -> Result<Self, ModelError> {
        let mut memory = Self::reserve(device, numbers.len(), what)?;
        memory.write(device, 0, numbers)?;
        device.finish()?;
        Ok(memory)
    }

    /// Copies numbers to where number `first` stands. They have to stay until the device has finished: where it reads the
    /// host's memory by itself, nothing is copied before.
    pub fn write(&mut self, device: &Device, first: usize, numbers: &[T]) -> Result<(), ModelError> {
        if numbers.is_empty() {
            return Ok(());
        }
        let mut place = self.numbers.slice_mut(first..first + numbers.len());
        device
            .stream()
            .memcpy_htod(numbers, &mut place)
            .map_err(|error| refused("a copy to the device", error))
    }

    /// Copies numbers from number `first` on to locked memory of the host, where they are when the device has finished.
    pub fn read(&self, device: &Device, first: usize, numbers: &mut [T]) -> Result<(), ModelError> {
        let place = self.numbers.slice(first..first + numbers.len());
        device.stream().memcpy_dtoh(&place, numbers).map_err(|error| refused("a copy from the device", error))
    }

    /// Copies numbers from number `first` on, as many as the other memory has. Both stay where they are until the device has
    /// finished.
    pub fn copy_to(&self, device: &Device, first: usize, to: &mut Self) -> Result<(), ModelError> {
        let place = self.numbers.slice(first..first + to.numbers.len());
        device
            .stream()
            .memcpy_dtod(&place, &mut to.numbers)
            .map_err(|error| refused("a copy within the device", error))
    }

    /// Where number `index` lies.
    pub fn at(&self, index: usize) -> u64 {
        debug_assert!(index < self.numbers.len());
        self.address + (index * size_of::<T>()) as u64
    }

    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    pub fn bytes(&self) -> usize {
        self.numbers.len() * size_of::<T>()
    }
}

impl<T: DeviceRepr + ValidAsZeroBits> Growing<T> {
    pub const fn new() -> Self {
        Self { memory: None }
    }

    /// Memory of at least `count` numbers.
    pub fn reserve(
        &mut self,
        device: &Device,
        count: usize,
        what: &str,
    ) -> Result<&mut Memory<T>, ModelError> {
        if self.memory.as_ref().is_none_or(|memory| memory.numbers.len() < count) {
            // The old one goes first: there may be no room for both.
            self.memory = None;
            self.memory = Some(Memory::reserve(device, count, what)?);
        }
        Ok(self.memory.as_mut().expect("memory that was reserved"))
    }

    /// As [`Memory::read`], of memory that was reserved, from the first number on.
    pub fn read(&self, device: &Device, numbers: &mut [T]) -> Result<(), ModelError> {
        self.memory.as_ref().expect("memory that was reserved").read(device, 0, numbers)
    }
}
