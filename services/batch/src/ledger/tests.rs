//! Lives of a job, cut short at every byte.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;

use super::*;
use crate::source::Frames;

const REQUESTS: u64 = 12;

fn identity() -> Identity {
    Identity { input: "digest".into(), requests: REQUESTS, settings: BTreeMap::new() }
}

fn line(number: u64) -> String {
    format!("{{\"id\":{number},\"text\":\"{}\"}}", "x".repeat(number as usize * 7 % 40))
}

fn open(path: &Path, order: Order, encoding: Encoding) -> Ledger {
    Ledger::open(path, identity(), order, encoding).unwrap()
}

/// Finishes what is not done, in an order that `dice` choose, and at most `count` of it.
fn live(ledger: &mut Ledger, count: usize, dice: u64) {
    let mut open: Vec<u64> = (0..REQUESTS).filter(|number| !ledger.is_done(*number)).collect();
    for step in 0..count.min(open.len()) {
        let number = open.remove((dice as usize).wrapping_mul(step + 7) % open.len());
        ledger.record(number, number.is_multiple_of(5), line(number)).unwrap();
    }
}

fn text(path: &Path, encoding: Encoding) -> String {
    let bytes = std::fs::read(path).unwrap();
    match encoding {
        Encoding::Plain => String::from_utf8(bytes).unwrap(),
        Encoding::Gzip => {
            let mut text = String::new();
            flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_string(&mut text).unwrap();
            text
        }
        Encoding::Zstandard => {
            let mut text = String::new();
            Frames::new(bytes.as_slice()).read_to_string(&mut text).unwrap();
            text
        }
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Between two lives the files lose their ends, as a kill or a power cut leaves them.
    #[test]
    fn a_job_cut_off_anywhere_writes_each_line_once(
        lives in prop::collection::vec((0usize..6, any::<u64>(), 0usize..300, 0usize..300, any::<bool>()), 0..6),
        order in prop::sample::select(vec![Order::Input, Order::Finished]),
        encoding in prop::sample::select(vec![Encoding::Plain, Encoding::Gzip, Encoding::Zstandard]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers");
        // What a compaction made safe stays.
        let (mut safe, mut safe_journal) = (0, 0);
        for (count, dice, output_cut, journal_cut, compacts) in lives {
            let mut ledger = open(&path, order, encoding);
            live(&mut ledger, count, dice);
            if compacts {
                ledger.compact().unwrap();
                (safe, safe_journal) = (ledger.bytes, ledger.journal.bytes());
            }
            drop(ledger);
            cut(&path, output_cut, safe);
            cut(&journal_path(&path), journal_cut, safe_journal);
            // Without its first line a journal says nothing, and the output beside it would be refused as somebody else's.
            if !std::fs::read(journal_path(&path)).unwrap().contains(&b'\n') {
                std::fs::write(&path, b"").unwrap();
            }
        }
        // A journal that lost its first line is nobody's, and so is the output.
        if Ledger::open(&path, identity(), order, encoding).is_err() {
            return Ok(());
        }
        let mut ledger = open(&path, order, encoding);
        live(&mut ledger, REQUESTS as usize, 3);
        ledger.close().unwrap();
        prop_assert_eq!((ledger.done(), ledger.failed()), (REQUESTS, 3));
        let expected: String = (0..REQUESTS).map(|number| line(number) + "\n").collect();
        let text = text(&path, encoding);
        match order {
            Order::Input => prop_assert_eq!(&text, &expected),
            Order::Finished => prop_assert_eq!(sorted(&text), sorted(&expected)),
        }
        drop(ledger);
        let ledger = open(&path, order, encoding);
        prop_assert_eq!(ledger.done_below(), REQUESTS);
    }
}

fn cut(path: &Path, bytes: usize, safe: u64) {
    let file = File::options().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(bytes as u64).max(safe.min(length))).unwrap();
}

#[test]
fn gzip_members_are_the_same_bytes_whoever_wrote_them() {
    let folder = tempfile::tempdir().unwrap();
    let requests = 600;
    let identity = Identity { requests, ..identity() };
    let ledger = |name: &str| {
        Ledger::open(&folder.path().join(name), identity.clone(), Order::Input, Encoding::Gzip).unwrap()
    };
    let mut whole = ledger("whole.gz");
    for number in 0..requests {
        whole.record(number, false, line(number)).unwrap();
    }
    for number in (0..requests).rev() {
        // A life for each hundred.
        if number % 100 == 99 {
            drop(ledger("lives.gz"));
        }
        ledger("lives.gz").record(number, false, line(number)).unwrap();
    }
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("whole.gz"), read("lives.gz"));
}

#[test]
fn what_is_not_this_jobs_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers");
    let fault =
        |identity| Ledger::open(&path, identity, Order::Input, Encoding::Plain).err().unwrap().to_string();
    std::fs::write(&path, "somebody's\n").unwrap();
    assert!(fault(identity()).contains("is there already"));
    std::fs::write(&path, "").unwrap();
    let mut ledger = open(&path, Order::Input, Encoding::Plain);
    assert!(fault(identity()).contains("in use by another process"));
    live(&mut ledger, 12, 1);
    ledger.close().unwrap();
    drop(ledger);
    assert!(fault(Identity { input: "other".into(), ..identity() }).contains("the input changed"));
    let settings = BTreeMap::from([("--seed".to_owned(), "2".to_owned())]);
    assert!(fault(Identity { settings, ..identity() }).contains("what --seed says changed"));
    std::fs::write(&path, "short").unwrap();
    assert!(fault(identity()).contains("restore it, or remove both"));
}

#[test]
fn a_rotten_line_of_the_journal_is_asked_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers");
    let mut ledger = open(&path, Order::Input, Encoding::Plain);
    for number in 0..6 {
        ledger.record(number, false, line(number)).unwrap();
    }
    drop(ledger);
    let journal = journal_path(&path);
    let mut bytes = std::fs::read(&journal).unwrap();
    let third = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(2).unwrap().0;
    bytes[third + 30] ^= 1;
    std::fs::write(&journal, bytes).unwrap();
    let mut ledger = open(&path, Order::Input, Encoding::Plain);
    assert_eq!((ledger.is_done(2), ledger.done()), (false, 5));
    live(&mut ledger, 12, 5);
    let expected: String = (0..REQUESTS).map(|number| line(number) + "\n").collect();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
}

#[test]
fn answers_that_wait_for_an_earlier_one_outlive_their_job() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    assert_eq!(waiting(&path, 0).unwrap(), Vec::<String>::new());
    for number in [0, 3, 2, 7] {
        open(&path, Order::Input, Encoding::Plain).record(number, false, line(number)).unwrap();
    }
    assert_eq!(text(&path, Encoding::Plain), line(0) + "\n");
    assert_eq!(waiting(&path, 1).unwrap(), [line(2), line(3), line(7)]);
}

#[test]
fn an_output_has_the_umask_s_mode_and_its_journal_is_its_owner_s_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    let mut ledger = open(&path, Order::Input, Encoding::Plain);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    // What the umask makes of any file.
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    assert_eq!((mode(&path), mode(&journal_path(&path))), (mode(&plain), 0o600));
    live(&mut ledger, 3, 1);
    ledger.close().unwrap();
    assert_eq!(mode(&journal_path(&path)), 0o600, "written anew");
}
