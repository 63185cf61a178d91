//! Graphs: one call in place of the launches of a step that comes again.
//!
//! A step's launches are recorded first and go to the device as a whole: by the graph of these very launches where it is kept, or
//! else one by one. So a graph cannot compute anything but what the step would have: kernels, grids and arguments are
//! the same to the last bit. What changes between steps of one batch stands in memory, at addresses that stay (`sheet.rs`).
//!
//! A graph may outlive memory that it names. It is launched by steps that name the same addresses, and so have memory there.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result, sys};
use uniarm_model::ModelError;

use crate::device::{Argument, Device, Grid, refused};

/// Tokens of a step that is recorded, at most. Larger ones are prompts, over which the device takes longer than launching does,
/// and whose sizes seldom come again.
pub(crate) const TOKENS_MAX: usize = 64;

/// Graphs that are kept: each takes memory of the device for all of its launches.
const GRAPHS_MAX: usize = 16;

/// Lists that are remembered, to know one that comes again.
const SEEN_MAX: usize = 64;

/// Steps from one graph to the next that is built. Building takes longer than launching, and would cost more than it spares where
/// each step is another one.
const STEPS_BETWEEN: u64 = 16;

/// Where launches go.
pub(crate) enum Launcher<'a> {
    /// To the device, at once.
    Device(&'a Device),
    /// Behind those that wait to go there together.
    List(&'a mut Launches),
}

/// Kernels with their grids and arguments, in the order in which a stream takes them.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Launches {
    launches: Vec<Launch>,
    arguments: Vec<Argument>,
}

/// Decides by which way a step's launches go, and keeps graphs.
#[derive(Default)]
pub(crate) struct Graphs {
    recorded: Launches,
    /// Of at most [`GRAPHS_MAX`] lists, the one that was used last behind the others.
    kept: Vec<(Launches, Graph)>,
    recurrence: Recurrence,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Launch {
    kernel: &'static str,
    grid: Grid,
    arguments: usize,
}

/// Which lists are worth a graph.
#[derive(Default)]
struct Recurrence {
    steps: u64,
    /// The step from which on a graph may be built.
    due: u64,
    /// Of lists without a graph: two that share a hash get one a step early.
    seen: VecDeque<u64>,
}

/// Launches as the driver has them ready.
struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<CudaStream>,
}

/// A graph that is put together.
struct Draft(sys::CUgraph);

/// Safety: nobody else has the handle, and the driver takes it on any thread.
unsafe impl Send for Graph {}

// === impl Launcher ===

impl Launcher<'_> {
    /// # Errors
    /// As of [`Device::launch`]; none where launches wait.
    ///
    /// # Safety
    /// As of [`Device::launch`].
    pub unsafe fn launch(
        &mut self,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), ModelError> {
        match self {
            // Safety: as promised by the caller.
            Self::Device(device) => unsafe { device.launch(kernel, grid, arguments) },
            Self::List(list) => {
                list.launches.push(Launch { kernel, grid, arguments: arguments.len() });
                list.arguments.extend_from_slice(arguments);
                Ok(())
            }
        }
    }
}

// === impl Launches ===

impl Launches {
    fn clear(&mut self) {
        self.launches.clear();
        self.arguments.clear();
    }

    fn iter(&self) -> impl Iterator<Item = (&Launch, &[Argument])> {
        let mut arguments = self.arguments.as_slice();
        self.launches.iter().map(move |launch| {
            let (own, rest) = arguments.split_at(launch.arguments);
            arguments = rest;
            (launch, own)
        })
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

// === impl Graphs ===

impl Graphs {
    /// An empty list for the launches of a step.
    pub fn record(&mut self) -> &mut Launches {
        self.recorded.clear();
        &mut self.recorded
    }

    /// Puts what was recorded behind everything that was launched before.
    ///
    /// # Errors
    /// As of [`Device::launch`].
    ///
    /// # Safety
    /// As of [`Device::launch`], for each launch.
    pub unsafe fn launch(&mut self, device: &Device) -> Result<(), ModelError> {
        self.recurrence.steps += 1;
        if let Some(index) = self.kept.iter().position(|(launches, _)| *launches == self.recorded) {
            let used = self.kept.remove(index);
            self.kept.push(used);
        } else if !self.build(device)? {
            for (Launch { kernel, grid, .. }, arguments) in self.recorded.iter() {
                // Safety: as promised by the caller.
                unsafe { device.launch(kernel, *grid, arguments) }?;
            }
            return Ok(());
        }
        let (_, graph) = self.kept.last().expect("the one that was found or built");
        graph.launch()
    }

    /// Builds a graph where the list is worth one; whether it has one now.
    fn build(&mut self, device: &Device) -> Result<bool, ModelError> {
        if !self.recurrence.is_worth_a_graph(self.recorded.digest()) {
            return Ok(false);
        }
        if self.kept.len() == GRAPHS_MAX {
            self.kept.remove(0);
        }
        match Graph::build(device, &self.recorded) {
            Ok(graph) => {
                self.kept.push((self.recorded.clone(), graph));
                Ok(true)
            }
            // Steps do without.
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(false),
            Err(error) => Err(refused("a graph", error)),
        }
    }
}

// === impl Recurrence ===

impl Recurrence {
    /// Whether a list that has no graph shall get one now.
    fn is_worth_a_graph(&mut self, hash: u64) -> bool {
        if !self.seen.contains(&hash) {
            if self.seen.len() == SEEN_MAX {
                self.seen.pop_front();
            }
            self.seen.push_back(hash);
            return false;
        }
        if self.steps < self.due {
            return false;
        }
        self.due = self.steps + STEPS_BETWEEN;
        true
    }
}

// === impl Graph ===

impl Graph {
    /// A chain of launches, each of which has been made before: their grids are possible, and their kernels loaded.
    fn build(device: &Device, launches: &Launches) -> Result<Self, DriverError> {
        let stream = Arc::clone(device.stream());
        stream.context().bind_to_thread()?;
        let mut draft = Draft::new()?;
        let mut last = None;
        for (Launch { kernel, grid, .. }, arguments) in launches.iter() {
            last = Some(draft.add(last, device.kernel(kernel), *grid, arguments)?);
        }
        // Safety: it is a graph, of which the executable is a copy.
        let executable = unsafe { result::graph::instantiate(draft.0, sys::CUgraphInstantiate_flags(0)) }?;
        Ok(Self { executable, stream })
    }

    fn launch(&self) -> Result<(), ModelError> {
        // Safety: both are there as long as this; the caller answers for what the kernels touch.
        let launched = self
            .stream
            .context()
            .bind_to_thread()
            .and_then(|()| unsafe { result::graph::launch(self.executable, self.stream.cu_stream()) });
        launched.map_err(|error| refused("a step's graph", error))
    }
}

impl Drop for Graph {
    /// The driver keeps what still runs.
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_ok() {
            // Safety: it is destroyed here alone. What the driver says of that, nobody can mend.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

// === impl Draft ===

impl Draft {
    fn new() -> Result<Self, DriverError> {
        let mut graph = MaybeUninit::uninit();
        // Safety: the driver writes the handle where it says that all is well.
        unsafe {
            sys::cuGraphCreate(graph.as_mut_ptr(), 0).result()?;
            Ok(Self(graph.assume_init()))
        }
    }

    /// A launch behind another one. The driver copies the arguments.
    fn add(
        &mut self,
        before: Option<sys::CUgraphNode>,
        kernel: sys::CUfunction,
        Grid { blocks, threads }: Grid,
        arguments: &[Argument],
    ) -> Result<sys::CUgraphNode, DriverError> {
        let mut values: Vec<*mut c_void> = arguments.iter().map(Argument::value).collect();
        let [x, y, z] = blocks.map(|count| count as u32);
        let launch = sys::CUDA_KERNEL_NODE_PARAMS {
            func: kernel,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: values.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        let before = before.as_slice();
        let mut node = MaybeUninit::uninit();
        // Safety: everything that is pointed to is there during the call; the driver writes the node where all is well.
        unsafe {
            sys::cuGraphAddKernelNode_v2(node.as_mut_ptr(), self.0, before.as_ptr(), before.len(), &launch)
                .result()?;
            Ok(node.assume_init())
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Safety: it is destroyed here alone, in the thread that has created it.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(launches: &[(&'static str, usize, &[u32])]) -> Launches {
        let mut list = Launches::default();
        for (kernel, blocks, arguments) in launches {
            let arguments: Vec<Argument> = arguments.iter().copied().map(Argument::Float).collect();
            let grid = Grid { blocks: [*blocks, 1, 1], threads: 32 };
            // Safety: it stays a list.
            unsafe { Launcher::List(&mut list).launch(kernel, grid, &arguments) }.expect("it only waits");
        }
        list
    }

    #[test]
    fn lists_are_equal_to_the_last_bit_or_not_at_all() {
        let one: &[(_, _, &[_])] = &[("gate", 3, &[7, 8]), ("place", 4, &[9])];
        assert!(list(one) == list(one));
        let zero = |zero: f32| list(&[("gate", 3, &[zero.to_bits()])]);
        assert!(zero(0.0) != zero(-0.0));
        let others: [&[(_, _, &[_])]; 6] = [
            &[("cut", 3, &[7, 8]), ("place", 4, &[9])],
            &[("gate", 2, &[7, 8]), ("place", 4, &[9])],
            &[("gate", 3, &[7, 8]), ("place", 4, &[10])],
            &[("gate", 3, &[7]), ("place", 4, &[8, 9])],
            &[("place", 4, &[9]), ("gate", 3, &[7, 8])],
            &[("gate", 3, &[7, 8])],
        ];
        for other in others {
            assert!(list(one) != list(other), "{other:?}");
        }
    }

    /// The steps, counted from 0, in which these lists get a graph where none has one.
    fn built(lists: impl IntoIterator<Item = u64>) -> Vec<usize> {
        let mut recurrence = Recurrence::default();
        let worth = lists.into_iter().map(|list| {
            recurrence.steps += 1;
            recurrence.is_worth_a_graph(list)
        });
        let worth: Vec<bool> = worth.collect();
        (0..worth.len()).filter(|step| worth[*step]).collect()
    }

    #[test]
    fn a_list_that_comes_again_is_worth_a_graph() {
        assert_eq!(built([7, 8, 9, 8]), [3]);
        assert_eq!(built(0..1000), [0; 0]);
    }

    #[test]
    fn building_takes_few_of_the_steps_whatever_comes() {
        let every = STEPS_BETWEEN as usize;
        assert_eq!(built((0..100).map(|step| step % 2)), (2..100).step_by(every).collect::<Vec<_>>());
    }

    #[test]
    fn a_list_is_forgotten_behind_many_others() {
        let among = |others: u64| [0].into_iter().chain(1..=others).chain([0]);
        let others = SEEN_MAX as u64;
        assert_eq!(built(among(others - 1)), [SEEN_MAX]);
        assert_eq!(built(among(others)), [0; 0]);
    }
}
