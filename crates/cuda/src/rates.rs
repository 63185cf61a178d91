//! What a device does by itself, beside what its maker says of it: products with weights, and copies.

use std::time::{Duration, Instant};

use uniarm_model::ModelError;

use crate::device::Device;
use crate::locked::Locked;
use crate::memory::Memory;
use crate::product::Product;
use crate::weights::{Matrix, WeightFormat};

/// Repeated until it takes as long, so that one look at the clock does not show.
const TIMED: Duration = Duration::from_millis(50);

/// What takes longer by itself is large enough: calling it does not show.
const LARGE_SECONDS: f64 = 2e-3;

/// Inputs of a matrix of twice as many outputs: the largest is 256 MiB of bf16, more than caches hold.
const INPUTS: [usize; 2] = [128, 8192];

/// Of a copy.
const BYTES: [usize; 2] = [1 << 20, 256 << 20];

/// Per second, as measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes of weights of bf16 that a product of one row reads.
    pub weights: f64,
    /// Operations of a product of [`Rates::ROWS`] rows with weights of bf16; a multiplication and an addition are two.
    pub operations: f64,
    /// Bytes copied from locked pages of the host, to such pages, and from the device's memory to the device's memory.
    pub to_device: f64,
    pub from_device: f64,
    pub within_device: f64,
}

// === impl Rates ===

impl Rates {
    /// Many enough that arithmetic bounds a product, as in a prompt.
    pub const ROWS: usize = 512;

    /// # Errors
    /// [`ModelError::Device`], as of [`CudaLlama::load`](crate::CudaLlama::load).
    pub fn measure(ordinal: usize) -> Result<Self, ModelError> {
        let device = Device::open(ordinal)?;
        WeightFormat::Bf16.check(&device)?;
        let weights = |inputs: usize| (2 * inputs * inputs) as f64;
        let (inputs, seconds) = grow(INPUTS, |inputs| product(&device, inputs, 1))?;
        let bytes = 2.0 * weights(inputs) / seconds;
        let (inputs, seconds) = grow(INPUTS, |inputs| product(&device, inputs, Self::ROWS))?;
        let operations = 2.0 * weights(inputs) * Self::ROWS as f64 / seconds;
        let copied = |measure: fn(&Device, usize) -> Result<f64, ModelError>| {
            grow(BYTES, |bytes| measure(&device, bytes)).map(|(bytes, seconds)| bytes as f64 / seconds)
        };
        Ok(Self {
            weights: bytes,
            operations,
            to_device: copied(to_device)?,
            from_device: copied(from_device)?,
            within_device: copied(within_device)?,
        })
    }
}

/// The first size, of those that double from the smallest to the largest, that takes long enough; and the seconds that it takes.
fn grow(
    [mut size, largest]: [usize; 2],
    mut seconds: impl FnMut(usize) -> Result<f64, ModelError>,
) -> Result<(usize, f64), ModelError> {
    loop {
        let taken = seconds(size)?;
        if taken >= LARGE_SECONDS || size >= largest {
            return Ok((size, taken));
        }
        size *= 2;
    }
}

/// Seconds that the device takes for what `run` puts on its stream.
fn time(device: &Device, mut run: impl FnMut() -> Result<(), ModelError>) -> Result<f64, ModelError> {
    // The first time finds nothing where it will be.
    run()?;
    device.finish()?;
    let mut times = 1;
    loop {
        let began = Instant::now();
        for _ in 0..times {
            run()?;
        }
        device.finish()?;
        let taken = began.elapsed();
        if taken >= TIMED {
            return Ok(taken.as_secs_f64() / f64::from(times));
        }
        times *= 2;
    }
}

fn product(device: &Device, inputs: usize, rows: usize) -> Result<f64, ModelError> {
    // Zeros would take less of the device's power, and so of its time.
    let number = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    let numbers = |count: usize| (0..count).map(number).collect::<Vec<f32>>();
    let matrix = Matrix::of(device, (&numbers(2 * inputs * inputs), inputs), WeightFormat::Bf16)?;
    let input = Memory::of(device, &numbers(rows * inputs), "rows")?;
    let output: Memory<f32> = Memory::reserve(device, rows * matrix.outputs, "products")?;
    let Product { kernel, grid, arguments } = Product::new(&matrix, (input.at(0), output.at(0), rows), false);
    // Safety: these are a product's arguments, and its memory is given back behind it.
    time(device, || unsafe { device.launch(kernel, grid, &arguments) })
}

fn to_device(device: &Device, bytes: usize) -> Result<f64, ModelError> {
    let (mut memory, mut pages) = (Memory::reserve(device, bytes, "a copy")?, Locked::<u8>::new());
    let pages = pages.reserve(device.stream(), bytes)?;
    time(device, || memory.write(device, 0, pages))
}

fn from_device(device: &Device, bytes: usize) -> Result<f64, ModelError> {
    let (memory, mut pages) = (Memory::reserve(device, bytes, "a copy")?, Locked::<u8>::new());
    let pages = pages.reserve(device.stream(), bytes)?;
    time(device, || memory.read(device, 0, pages))
}

fn within_device(device: &Device, bytes: usize) -> Result<f64, ModelError> {
    let from: Memory<u8> = Memory::reserve(device, bytes, "a copy")?;
    let mut to = Memory::reserve(device, bytes, "a copy")?;
    time(device, || from.copy_to(device, 0, &mut to))
}
