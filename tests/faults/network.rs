//! A network of its own for each process: namespaces with addresses, and a router between them that can be told to
//! drop, to lose, and to be slow.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::Path,
    process::{Command, Stdio},
};

use crate::harness::Host;

/// Namespaces of ours begin with this, and with the id of the process that made them: a killed run leaves some behind.
const PREFIX: &str = "uniarm-faults-";

/// Of the namespace in the middle, which forwards between all others.
const MIDDLE: &str = "middle";

/// Set aside for tests between networks (RFC 2544): no machine has a route there that means something.
const ADDRESSES: &str = "198.18";

/// Rules of the router that drop come before those that forward.
const DROP_PREFERENCE: &str = "10";

/// A burst of two full packets, and a queue as a cheap router has it.
const LIMIT_BURST_BYTES: &str = "6000";
const LIMIT_QUEUE: &str = "200ms";

/// Hosts behind one router. It is gone with this value.
pub struct Network {
    name: String,
    hosts: usize,
}

/// Packets that vanish between two hosts.
#[derive(Debug, Clone)]
pub enum Cut {
    /// Those from the first to the second.
    OneWay(usize, usize),
    Both(usize, usize),
}

// === impl Network ===

impl Network {
    /// So many hosts.
    ///
    /// # Errors
    /// Says what this machine does not have or allow.
    pub fn lay(hosts: usize) -> Result<Self, String> {
        // SAFETY: geteuid(2) takes nothing, and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return Err("network namespaces want root".to_owned());
        }
        sweep();
        let network = Self { name: format!("{PREFIX}{}-", std::process::id()), hosts };
        let middle = network.namespace(MIDDLE);
        ip(&["netns", "add", &middle])?;
        ip(&["-n", &middle, "link", "set", "lo", "up"])?;
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        ip(&["netns", "exec", &middle, "sh", "-c", forward])?;
        (0..hosts).try_for_each(|host| network.lay_host(host, &middle))?;
        Ok(network)
    }

    fn lay_host(&self, host: usize, middle: &str) -> Result<(), String> {
        let (own, port) = (self.namespace(&host.to_string()), port(host));
        ip(&["netns", "add", &own])?;
        ip(&["link", "add", &port, "netns", middle, "type", "veth", "peer", "name", "eth0", "netns", &own])?;
        let ends = [(middle, port.as_str(), 1), (own.as_str(), "eth0", 2)];
        for (namespace, link, last) in ends {
            let address = format!("{ADDRESSES}.{host}.{last}/24");
            ip(&["-n", namespace, "address", "add", &address, "dev", link])?;
            ip(&["-n", namespace, "link", "set", link, "up"])?;
        }
        ip(&["-n", &own, "link", "set", "lo", "up"])?;
        ip(&["-n", &own, "route", "add", "default", "via", &format!("{ADDRESSES}.{host}.1")])
    }

    pub fn host(&self, host: usize) -> Host {
        assert!(host < self.hosts);
        Host { namespace: Some(self.namespace(&host.to_string())), libraries: None, address: address(host) }
    }

    /// From here on this thread, and those that it starts, are on that host.
    pub fn enter(&self, host: usize) {
        let namespace = Path::new("/run/netns").join(self.namespace(&host.to_string()));
        let namespace = File::open(namespace).unwrap();
        // SAFETY: setns(2) takes an open handle of a namespace and changes nothing but this thread's network.
        let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "{}", std::io::Error::last_os_error());
    }

    /// The router drops these packets without a word.
    pub fn cut(&self, cuts: &[Cut]) {
        self.rules("add", cuts);
    }

    pub fn mend(&self, cuts: &[Cut]) {
        self.rules("del", cuts);
    }

    fn rules(&self, change: &str, cuts: &[Cut]) {
        for cut in cuts {
            let directions = match *cut {
                Cut::OneWay(from, to) => vec![(from, to)],
                Cut::Both(a, b) => vec![(a, b), (b, a)],
            };
            for (from, to) in directions {
                let (from, to) = (address(from), address(to));
                let rule = ["from", &from, "to", &to, "preference", DROP_PREFERENCE, "blackhole"];
                let middle = self.namespace(MIDDLE);
                ip(&[&["-n", &middle, "rule", change][..], &rule].concat()).unwrap();
            }
        }
    }

    /// What this host sends and hears fits through so many kilobits a second.
    pub fn narrow(&self, host: usize, kilobits: u32) {
        for (namespace, link) in self.ends(host) {
            let rate = format!("{kilobits}kbit");
            let shape = ["root", "tbf", "rate", &rate, "burst", LIMIT_BURST_BYTES, "latency", LIMIT_QUEUE];
            run("tc", &[&["-n", &namespace, "qdisc", "add", "dev", &link][..], &shape].concat()).unwrap();
        }
    }

    pub fn widen(&self, host: usize) {
        for (namespace, link) in self.ends(host) {
            run("tc", &["-n", &namespace, "qdisc", "del", "dev", &link, "root"]).unwrap();
        }
    }

    fn ends(&self, host: usize) -> [(String, String); 2] {
        [(self.namespace(MIDDLE), port(host)), (self.namespace(&host.to_string()), "eth0".to_owned())]
    }

    /// The router loses this share of all packets, at random.
    ///
    /// # Errors
    /// Where there is no iptables.
    pub fn lose(&self, share: f64) -> Result<(), String> {
        self.forwarding("-A", share)
    }

    pub fn keep(&self, share: f64) -> Result<(), String> {
        self.forwarding("-D", share)
    }

    fn forwarding(&self, change: &str, share: f64) -> Result<(), String> {
        let (middle, share) = (self.namespace(MIDDLE), share.to_string());
        let rule = ["FORWARD", "-m", "statistic", "--mode", "random", "--probability", &share, "-j", "DROP"];
        ip(&[&["netns", "exec", &middle, "iptables", change][..], &rule].concat())
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(|name| name.starts_with(&self.name));
    }
}

fn address(host: usize) -> String {
    format!("{ADDRESSES}.{host}.2")
}

/// In the middle.
fn port(host: usize) -> String {
    format!("host{host}")
}

/// Removes what killed runs have left behind, and ends what still runs there.
fn sweep() {
    remove(|name| {
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        maker.is_some_and(|process| !Path::new("/proc").join(process).exists())
    });
}

fn remove(is_ours: impl Fn(&str) -> bool) {
    let Ok(listed) = run("ip", &["netns", "list"]) else { return };
    // A line may say more than the name.
    let names = listed.lines().filter_map(|line| line.split(' ').next());
    for name in names.filter(|name| is_ours(name)) {
        let inside = run("ip", &["netns", "pids", name]).unwrap_or_default();
        for process in inside.lines().filter_map(|line| line.trim().parse::<libc::pid_t>().ok()) {
            // SAFETY: kill(2) takes plain numbers; the process is in a namespace that a run of this test made.
            unsafe { libc::kill(process, libc::SIGKILL) };
        }
        let _ = run("ip", &["netns", "delete", name]);
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    run("ip", arguments).map(drop)
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program} cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), said.trim()))
}
