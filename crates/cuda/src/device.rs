//! A GPU with its stream and its compiled kernels; what is missing is said before anything is tried.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{ptr, thread};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg as _};
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};
use libloading::Library;
use uniarm_model::ModelError;

/// The kernels, one program.
const SOURCE: &str = concat!(
    include_str!("kernels/common.cu"),
    include_str!("kernels/half.cu"),
    include_str!("kernels/tensor.cu"),
    include_str!("kernels/matmul.cu"),
    include_str!("kernels/matmul_bf16.cu"),
    include_str!("kernels/rows.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/adapter.cu"),
    include_str!("kernels/group.cu"),
    include_str!("kernels/likeliest.cu"),
);

const KERNELS: [&str; 27] = [
    "embed_f32",
    "embed_bf16",
    "rms_norm",
    "rotate_and_append_f32",
    "rotate_and_append_f16",
    "gate",
    "matmul_f32_1",
    "matmul_f32_2",
    "matmul_f32_4",
    "matmul_f32_8",
    "matmul_bf16_8",
    "matmul_bf16_16",
    "matmul_bf16_32",
    "attention_f32_32",
    "attention_f32_64",
    "attention_f32_128",
    "attention_f32_256",
    "attention_f16_32",
    "attention_f16_64",
    "attention_f16_128",
    "attention_f16_256",
    "adapter_down",
    "adapter_up",
    "cut",
    "place",
    "list_parts",
    "list_rows",
];

/// How long whoever gives memory back waits for a stream: steps take less, and what was aborted ends sooner.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_micros(200);

/// The second and third dimension of a grid have 16 bits.
const GRID_MAX: usize = u16::MAX as usize;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Code that the driver translates for its device, as 9.0 of an H100.
    Virtual(u32, u32),
    /// Machine code: the compiler's last pass runs too.
    Real(u32, u32),
}

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    pub name: String,
    /// Of memory.
    pub bytes: usize,
    /// Major and minor, as 9.0 of an H100.
    pub capability: (u32, u32),
    /// Bytes per second that its memory gives at most; none where the driver does not say.
    pub bandwidth: Option<f64>,
}

pub(crate) struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<&'static str, CudaFunction>,
    name: String,
    capability: (u32, u32),
}

/// One argument of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Argument {
    Address(u64),
    Integer(i32),
    /// The bits of an f32: arguments are the same where all bits are.
    Float(u32),
}

/// How many blocks of how many threads.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Grid {
    pub blocks: [usize; 3],
    pub threads: u32,
}

impl Device {
    /// # Errors
    /// [`ModelError::Device`] for a library that is missing, a device that is not there, and what driver and compiler say.
    pub fn open(ordinal: usize) -> Result<Self, ModelError> {
        let stream = open_stream(ordinal)?;
        check_compiler()?;
        let context = Arc::clone(stream.context());
        let (major, minor) =
            context.compute_capability().map_err(|error| refused("the device's version", error))?;
        let capability = (major.unsigned_abs(), minor.unsigned_abs());
        let code = compile(Architecture::Virtual(capability.0, capability.1))?;
        let module = context.load_module(code).map_err(|error| {
            ModelError::Device(format!(
                "the driver does not take the kernels: {error}. It has to be as new as the compiler (libnvrtc): update the \
                 driver, or install the libnvrtc of its CUDA version"
            ))
        })?;
        let kernels: Result<HashMap<_, _>, DriverError> =
            KERNELS.into_iter().map(|name| Ok((name, module.load_function(name)?))).collect();
        let kernels = kernels.map_err(|error| refused("the kernels", error))?;
        let name = context.name().map_err(|error| refused("the device's name", error))?;
        Ok(Self { context, stream, kernels, name, capability })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor, as 9.0 of an H100.
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    pub fn bandwidth(&self) -> Option<f64> {
        bandwidth(&self.context)
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream, as other libraries know it.
    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// A kernel, as the driver knows it; it is there as long as the device.
    pub fn kernel(&self, name: &str) -> CUfunction {
        self.kernels[name].cu_function()
    }

    /// Waits until everything is computed.
    pub fn finish(&self) -> Result<(), ModelError> {
        self.stream.synchronize().map_err(|error| refused("a step", error))
    }

    /// Puts a kernel behind everything that was launched before.
    ///
    /// # Errors
    /// [`ModelError::Device`]; a failure of an earlier kernel may show here.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what it reads and writes is there until it has run.
    pub unsafe fn launch(&self, name: &str, grid: Grid, arguments: &[Argument]) -> Result<(), ModelError> {
        let [x, y, z] = grid.blocks;
        if x > i32::MAX as usize || y > GRID_MAX || z > GRID_MAX {
            return Err(ModelError::Device(format!(
                "{name} over {x} × {y} × {z} blocks: give a step fewer tokens"
            )));
        }
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (grid.threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = self.stream.launch_builder(&self.kernels[name]);
        for argument in arguments {
            match argument {
                Argument::Address(address) => launch.arg(address),
                Argument::Integer(integer) => launch.arg(integer),
                Argument::Float(bits) => launch.arg(bits),
            };
        }
        // Safety: as promised by the caller.
        match unsafe { launch.launch(config) } {
            Ok(_) => Ok(()),
            Err(error) => Err(refused(name, error)),
        }
    }
}

impl Argument {
    pub fn float(number: f32) -> Self {
        Self::Float(number.to_bits())
    }

    /// Where its value stands, as the driver wants to know it; it only reads there.
    pub fn value(&self) -> *mut c_void {
        match self {
            Self::Address(address) => ptr::from_ref(address).cast_mut().cast(),
            Self::Integer(integer) => ptr::from_ref(integer).cast_mut().cast(),
            Self::Float(bits) => ptr::from_ref(bits).cast_mut().cast(),
        }
    }
}

impl Architecture {
    fn option(self) -> String {
        match self {
            Self::Virtual(major, minor) => format!("--gpu-architecture=compute_{major}{minor}"),
            Self::Real(major, minor) => format!("--gpu-architecture=sm_{major}{minor}"),
        }
    }
}

/// A stream of its own on a device.
///
/// # Errors
/// [`ModelError::Device`] for a driver that is missing, a device that is not there, and what the driver says.
pub(crate) fn open_stream(ordinal: usize) -> Result<Arc<CudaStream>, ModelError> {
    check_driver()?;
    let context = CudaContext::new(ordinal).map_err(|error| {
        let count = CudaContext::device_count().unwrap_or(0);
        ModelError::Device(format!("device {ordinal} of {count} (counted from 0) cannot be opened: {error}"))
    })?;
    // Safety: whoever opens a stream uses what is its own on this one alone, in order.
    unsafe { context.disable_event_tracking() };
    context.new_stream().map_err(|error| refused("a stream", error))
}

/// Whether a stream has nothing left to do, within the time that an abort takes to show.
pub(crate) fn is_idle_soon(stream: &CudaStream) -> bool {
    let began = Instant::now();
    // Safety: the stream is there as long as the reference.
    let state = || unsafe { sys::cuStreamQuery(stream.cu_stream()) };
    while state() == sys::CUresult::CUDA_ERROR_NOT_READY && began.elapsed() < PATIENCE {
        thread::sleep(PAUSE);
    }
    state() == sys::CUresult::CUDA_SUCCESS
}

/// The GPUs that this process sees, by their numbers.
///
/// # Errors
/// [`ModelError::Device`] for a driver that is missing, or fails.
pub fn gpus() -> Result<Vec<Gpu>, ModelError> {
    check_driver()?;
    let count = CudaContext::device_count().map_err(|error| refused("the driver", error))?;
    let describe = |ordinal| {
        let context = CudaContext::new(ordinal)?;
        let (major, minor) = context.compute_capability()?;
        Ok(Gpu {
            name: context.name()?,
            bytes: context.total_mem()?,
            capability: (major.unsigned_abs(), minor.unsigned_abs()),
            bandwidth: bandwidth(&context),
        })
    };
    let gpus: Result<Vec<Gpu>, DriverError> = (0..count.unsigned_abs() as usize).map(describe).collect();
    gpus.map_err(|error| refused("the driver", error))
}

/// By the memory's clock and its width.
fn bandwidth(context: &CudaContext) -> Option<f64> {
    let attribute = |attribute| context.attribute(attribute).ok().filter(|value| *value > 0);
    let kilohertz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    // Two transfers a clock.
    Some(2.0 * f64::from(kilohertz) * 1e3 * f64::from(bits) / 8.0)
}

/// Compiles all kernels; needs the compiler, and no device.
///
/// # Errors
/// [`ModelError::Device`] for a compiler that is missing, and with its words where it refuses.
pub fn check_kernels(architecture: Architecture) -> Result<(), ModelError> {
    check_compiler()?;
    compile(architecture).map(|_| ())
}

fn compile(architecture: Architecture) -> Result<Ptx, ModelError> {
    // Multiply-adds are written out; those that the compiler made by itself would differ between instances of a template.
    let options = vec!["--std=c++17".to_owned(), architecture.option()];
    let options = CompileOptions { fmad: Some(false), options, ..CompileOptions::default() };
    compile_ptx_with_opts(SOURCE, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => ModelError::Device(format!(
            "the kernels do not compile ({}): {}",
            architecture.option(),
            log.to_string_lossy()
        )),
        other => ModelError::Device(format!("the compiler of kernels (libnvrtc) failed: {other}")),
    })
}

/// cudarc panics at the first call of a library that is not there, and cannot be asked where another crate of the build has it
/// link them. These names are among those that it tries.
fn is_there(names: &[&str]) -> bool {
    // Safety: loads the library, whose initialisers are NVIDIA's.
    names.iter().any(|name| unsafe { Library::new(*name) }.is_ok())
}

fn check_driver() -> Result<(), ModelError> {
    if is_there(&["libcuda.so.1", "libcuda.so"]) {
        return Ok(());
    }
    Err(ModelError::Device(
        "no NVIDIA driver (libcuda.so.1) on this machine. Install it, run in a container that has it, or compute on the CPU"
            .to_owned(),
    ))
}

fn check_compiler() -> Result<(), ModelError> {
    if is_there(&["libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.12"]) {
        return Ok(());
    }
    Err(ModelError::Device(
        "no compiler of kernels (libnvrtc.so.13). Install NVIDIA's CUDA 13 runtime compiler, and name its folder in \
         LD_LIBRARY_PATH; or compute on the CPU"
            .to_owned(),
    ))
}

pub(crate) fn refused(what: &str, error: DriverError) -> ModelError {
    ModelError::Device(format!("{what}: {error}"))
}
