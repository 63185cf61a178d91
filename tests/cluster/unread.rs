//! Standard output that is full, or that nobody reads: a command ends with a sentence or quietly, and a server serves on.

use std::{
    fs::File,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::harness::{free_address, http_get};

const READY_TIMEOUT: Duration = Duration::from_secs(20);

fn uniarm(args: &[&str], stdout: Stdio) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
    command.args(args).stdout(stdout).stderr(Stdio::piped());
    command
}

/// Every write to it fails for want of space.
fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

/// A pipe whose reader is gone, as behind `| head`.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_result_that_cannot_be_said_ends_a_command_with_a_sentence_and_behind_a_closed_pipe_quietly() {
    for args in [&["man"][..], &["man", "--reference"], &["completions", "bash"], &["keys", "new"]] {
        let ended = uniarm(args, full()).output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("error: cannot write to standard output: "), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");

        let ended = uniarm(args, closed()).output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!((ended.status.code(), said.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_router_whose_words_nobody_reads_serves_until_it_is_stopped() {
    for stdout in [full(), closed()] {
        let admin = free_address();
        let flags = ["router", "--base-peer", "127.0.0.1:1", "--admin", &admin, "--log-filter", "error"];
        let child = uniarm(&flags, stdout).spawn().unwrap();
        let began = Instant::now();
        let is_ready = || {
            std::net::TcpStream::connect(&admin).is_ok()
                && http_get(&admin, "/readyz").starts_with("HTTP/1.1 200")
        };
        while !is_ready() {
            assert!(began.elapsed() < READY_TIMEOUT, "the router is not ready");
            thread::sleep(Duration::from_millis(20));
        }
        // SAFETY: kill(2) takes plain numbers; the child has not been waited for, so its id is still its own.
        unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.success(), "{}: {}", ended.status, String::from_utf8_lossy(&ended.stderr));
    }
}
