//! Who runs on which core, and what it used there. Linux.

use std::{io, mem, time::Duration};

use anyhow::Context as _;

/// Cores of this machine, parted between the router and the rest.
pub struct Cores {
    /// `None`: there is one core, for everything.
    router: Option<usize>,
}

/// Since a process began.
#[derive(Clone, Copy)]
pub struct Used {
    pub cpu: Duration,
    pub resident_bytes: u64,
}

// === impl Cores ===

impl Cores {
    /// Gives the first core of this process to the router, and leaves it.
    pub fn part() -> anyhow::Result<Self> {
        let own = allowed().context("the cores of this process")?;
        let [router, rest @ ..] = own.as_slice() else { return Ok(Self { router: None }) };
        if rest.is_empty() {
            return Ok(Self { router: None });
        }
        // Each thread has cores of its own: those that the runtime has started already move too.
        for task in std::fs::read_dir("/proc/self/task")? {
            if let Some(id) = task?.file_name().to_str().and_then(|name| name.parse().ok()) {
                restrict(id, rest).context("cannot leave a core to the router")?;
            }
        }
        Ok(Self { router: Some(*router) })
    }

    pub fn router(&self) -> Option<usize> {
        self.router
    }
}

fn allowed() -> io::Result<Vec<usize>> {
    // SAFETY: a set of bits, all zero.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the set is of the size that is said.
    match unsafe { libc::sched_getaffinity(0, mem::size_of_val(&set), &raw mut set) } {
        0 => {
            // SAFETY: indices below the number of bits.
            let is_in = |core: &usize| unsafe { libc::CPU_ISSET(*core, &set) };
            Ok((0..libc::CPU_SETSIZE as usize).filter(is_in).collect())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps a thread to these cores; 0 is the calling one.
pub fn restrict(thread: libc::pid_t, cores: &[usize]) -> io::Result<()> {
    // SAFETY: a set of bits, all zero.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for core in cores {
        // SAFETY: an index that `allowed` found.
        unsafe { libc::CPU_SET(*core, &mut set) };
    }
    // SAFETY: the set is of the size that is said.
    match unsafe { libc::sched_setaffinity(thread, mem::size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a process has used so far.
pub fn used(process: u32) -> Option<Used> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Behind the name, which may hold spaces: proc(5) counts utime, stime and rss as 14, 15 and 24.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    // SAFETY: sysconf(3) takes plain numbers.
    let [ticks, page] =
        [libc::_SC_CLK_TCK, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) } as u64);
    Some(Used {
        cpu: Duration::from_secs_f64((number(11)? + number(12)?) as f64 / ticks as f64),
        resident_bytes: number(21)? * page,
    })
}
