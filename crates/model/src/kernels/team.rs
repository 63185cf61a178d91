//! The threads of one model: they share out tasks, and never the terms of a sum.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// A pool of its own for each model: a base and a reward model in one process do not wait for each other.
pub struct Team {
    /// None for one thread: everything runs on the caller's.
    pool: Option<ThreadPool>,
    threads: usize,
}

impl Team {
    /// # Errors
    /// The operating system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        let threads = threads.max(1);
        let pool = match threads {
            1 => None,
            _ => Some(
                ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("forward-{index}"))
                    .build()?,
            ),
        };
        Ok(Self { pool, threads })
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `step` on a thread of the team, from where [`Team::share`] is cheap: the others stay awake
    /// between its calls.
    pub fn enter<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            None => step(),
            Some(pool) => pool.install(step),
        }
    }

    /// Runs `task(0..tasks)`, each once, on whichever thread is free; returns when all are done.
    pub fn share(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let others = self.threads.min(tasks).saturating_sub(1);
        if others == 0 {
            return (0..tasks).for_each(task);
        }
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= tasks {
                    return;
                }
                task(index);
            }
        };
        call(1 + others, &work);
    }
}

/// Calls `work` so many times, each on a thread of its own if one is free. Halves of halves: what others may take lies on
/// the stack, where a scope's tasks would be allocated one by one.
fn call(times: usize, work: &(impl Fn() + Sync)) {
    match times {
        1 => work(),
        _ => {
            rayon::join(|| call(times.div_ceil(2), work), || call(times / 2, work));
        }
    }
}
