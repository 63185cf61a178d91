//! Lanes of whole rows between GPUs, without any: both ends are threads over a libcuda that runs the kernels on the CPU, and a
//! libnccl that copies between them.
//!
//! The program starts itself again where the loader finds both libraries; without a test harness, so that what these count is one
//! test's alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::ffi::c_int;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::CudaContext;
use uniarm_cuda::{CudaLanes, CudaLlama, CudaOptions, WeightFormat};
use uniarm_model::{
    DeviceRow, Forward, Hangup, Likeliest, Listing, Lists, ModelError, Part, Row, RowLanes, RowReceiver,
    RowSender, ScriptedForward, ScriptedOptions,
};

#[path = "support/fakes.rs"]
mod fakes;
#[allow(dead_code)] // one shape does, without adapters
#[path = "support/made_up.rs"]
mod made_up;

use made_up::{LLAMA, Scene, VOCABULARY};

/// Set in the process that finds the libraries.
const FAKE: &str = "UNIARM_TEST_FAKE_LANES";

/// Long enough for a machine that is in use besides.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Where the timeout is what ends a call.
const SHORT: Duration = Duration::from_secs(2);

const BLOCK_TOKENS: usize = 16;
const CACHE_BLOCKS: usize = 32;

/// Settings of `fake_nccl_set`.
const QUIET_ABORTS: c_int = 0;
const HANG_LAUNCH: c_int = 1;
const FAIL_LAUNCH: c_int = 2;

fn main() {
    let tests: [(&str, fn()); 6] = [
        ("rows arrive bit for bit and in order", rows_arrive_bit_for_bit_and_in_order),
        ("a row that stays on the device costs no copy", a_row_that_stays_on_the_device_costs_no_copy),
        ("an end that goes at any call closes the other", an_end_that_goes_at_any_call_closes_the_other),
        (
            "an end that hangs closes the other at the timeout",
            an_end_that_hangs_closes_the_other_at_the_timeout,
        ),
        ("what nccl fails at or hangs in ends both", what_nccl_fails_at_or_hangs_in_ends_both),
        ("what is no row and no lane is refused", what_is_no_row_and_no_lane_is_refused),
    ];
    fakes::run(FAKE, "lanes between GPUs", &tests);
}

type Ends = (Box<dyn RowReceiver>, Box<dyn RowSender>);

/// Both ends of a lane.
fn lane(timeout: Duration) -> Ends {
    let lanes = CudaLanes::new(0, timeout);
    let offer = lanes.offer().unwrap();
    thread::scope(|scope| {
        let sender = scope.spawn(|| lanes.sender(&offer).unwrap());
        (lanes.receiver(&offer).unwrap(), sender.join().unwrap())
    })
}

fn load(scene: &Scene) -> CudaLlama {
    let weights = WeightFormat::F32;
    let options =
        CudaOptions { device: 0, kv_blocks: CACHE_BLOCKS, block_tokens: BLOCK_TOKENS, weights, graphs: true };
    CudaLlama::load(&scene.files, &options).unwrap()
}

fn prompt(seed: u32, count: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7;
    (0..count as u32).map(|i| number(i) % VOCABULARY as u32).collect()
}

/// Rows of a new sequence, whose logits are all wanted: on the host, and on the device.
fn rows(model: &mut CudaLlama, seed: u32, count: usize) -> (Vec<f32>, Vec<DeviceRow>) {
    let tokens = prompt(seed, count);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0, 1, 2, 3], logits_from: 0, adapter: None };
    let (mut logits, mut lists) = (Vec::new(), Lists::default());
    model.forward(&[row], &mut logits).unwrap();
    model.forward_listed((&[row], &[Some(Likeliest::KEPT)]), (&mut Vec::new(), &mut lists)).unwrap();
    assert!(lists.iter().all(<[_]>::is_empty) && lists.iter().count() == count);
    let numbers: Vec<u64> = (lists.first..lists.first + count as u64).collect();
    (logits, model.detach_rows(&numbers).unwrap())
}

/// The same without a model's arithmetic.
fn some_rows(model: &mut CudaLlama, count: usize) -> Vec<(DeviceRow, usize)> {
    rows(model, 5, count).1.into_iter().map(|row| (row, VOCABULARY)).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Of the fake libnccl that this process has loaded.
fn fake<F: Copy>(name: &str) -> F {
    // Safety: the fake does nothing when it is loaded, and both callers name the type of their function.
    unsafe { *libloading::Library::new("libnccl.so.2").unwrap().get::<F>(name.as_bytes()).unwrap() }
}

fn set(setting: c_int, value: c_int) {
    fake::<extern "C" fn(c_int, c_int) -> c_int>("fake_nccl_set")(setting, value);
}

/// Runs a test, after which the device and NCCL hold what they held before.
fn leaving_nothing(test: impl FnOnce()) {
    let context = CudaContext::new(0).unwrap();
    let free = || context.mem_get_info().unwrap().0;
    let living = || fake::<extern "C" fn() -> c_int>("fake_nccl_living")();
    let before = free();
    test();
    // Threads that hang up, and memory that is given back in the order of a stream, take a moment.
    let began = Instant::now();
    while (free(), living()) != (before, 0) {
        assert!(
            began.elapsed() < TIMEOUT,
            "{} bytes and {} communicators are left",
            before - free(),
            living()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn rows_arrive_bit_for_bit_and_in_order() {
    leaving_nothing(|| {
        let scene = LLAMA.scene();
        let mut model = load(&scene);
        let (mut receiver, mut sender) = lane(TIMEOUT);
        // One row, several, more than are received at once; and parts of rows.
        for (index, count) in [1, 1, 3, 16, 40, 17, 1].into_iter().cycle().take(21).enumerate() {
            let length = if index % 4 == 3 { VOCABULARY - index } else { VOCABULARY };
            let (expected, detached) = rows(&mut model, index as u32, count);
            let received = thread::scope(|scope| {
                let rows = detached.into_iter().map(|row| (row, length)).collect();
                let sending = scope.spawn(|| sender.send(rows));
                let received = receiver.receive(&vec![length; count]).unwrap();
                sending.join().unwrap().unwrap();
                received
            });
            assert_eq!(received.len(), count);
            for (received, expected) in received.iter().zip(expected.chunks_exact(VOCABULARY)) {
                assert_eq!(bits(received), bits(&expected[..length]), "message {index}");
            }
        }
        // A sender may be many messages ahead.
        let (expected, detached) = rows(&mut model, 99, 12);
        thread::scope(|scope| {
            scope.spawn(|| {
                for row in detached {
                    sender.send(vec![(row, VOCABULARY)]).unwrap();
                }
            });
            let received: Vec<f32> =
                (0..4).flat_map(|_| receiver.receive(&[VOCABULARY; 3]).unwrap()).flatten().collect();
            assert_eq!(bits(&received), bits(&expected));
        });
        // Without a model the ends go on, and memory of rows is given back after it.
        let (expected, detached) = rows(&mut model, 3, 2);
        drop(model);
        thread::scope(|scope| {
            let rows = detached.into_iter().map(|row| (row, VOCABULARY)).collect();
            let sending = scope.spawn(|| sender.send(rows));
            let received = receiver.receive(&[VOCABULARY; 2]).unwrap().concat();
            sending.join().unwrap().unwrap();
            assert_eq!(bits(&received), bits(&expected));
        });
    });
}

fn a_row_that_stays_on_the_device_costs_no_copy() {
    let scene = LLAMA.scene();
    let mut model = load(&scene);
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 3, adapter: None };
    let mut kept = |wanted: Likeliest| {
        let mut lists = Lists::default();
        let before = fakes::count("fake_bytes_to_host");
        model.forward_listed((&[row], &[Some(wanted)]), (&mut Vec::new(), &mut lists)).unwrap();
        let numbers = [lists.first, lists.first + 1];
        for _ in 0..2 {
            assert_eq!(model.detach_rows(&numbers).unwrap().len(), 2);
        }
        fakes::count("fake_bytes_to_host") - before
    };
    assert_eq!(kept(Likeliest::KEPT), 0);
    // Rows behind lists can be had as well.
    assert_eq!(kept(Likeliest { count: 4, ..Likeliest::KEPT }), 2 * 4 * 12);
    // Memory that came back is used again.
    let before = fakes::count("fake_allocations");
    assert_eq!(kept(Likeliest::KEPT), 0);
    assert_eq!(fakes::count("fake_allocations"), before);
}

/// What an end does when it goes.
#[derive(Clone, Copy, Debug)]
enum Going {
    HangsUp,
    IsDropped,
}

/// Calls until one fails: why, and how long that one took.
fn until_it_fails(mut call: impl FnMut() -> Result<(), ModelError>) -> (String, Duration) {
    for _ in 0..8 {
        let began = Instant::now();
        if let Err(error) = call() {
            let took = began.elapsed();
            let again = call().unwrap_err();
            assert!(matches!(again, ModelError::Lane(_)), "{again}: a lane that failed is closed");
            return (error.to_string(), took);
        }
    }
    panic!("no call failed")
}

fn an_end_that_goes_at_any_call_closes_the_other() {
    leaving_nothing(|| {
        let scene = LLAMA.scene();
        let mut model = load(&scene);
        for going in [Going::HangsUp, Going::IsDropped] {
            for calls in 0..3 {
                // The receiver goes.
                let (mut receiver, mut sender) = lane(TIMEOUT);
                let (error, took) = thread::scope(|scope| {
                    scope.spawn(move || {
                        (0..calls).for_each(|_| drop(receiver.receive(&[VOCABULARY]).unwrap()));
                        go(going, &receiver.hangup(), receiver);
                    });
                    until_it_fails(|| sender.send(some_rows(&mut model, 1)))
                });
                assert!(took < TIMEOUT / 2, "the receiver, {going:?} at call {calls}: {took:?}, {error}");
                // The sender goes.
                let (mut receiver, mut sender) = lane(TIMEOUT);
                let rows: Vec<_> = (0..calls).map(|_| some_rows(&mut model, 1)).collect();
                let (error, took) = thread::scope(|scope| {
                    scope.spawn(move || {
                        rows.into_iter().for_each(|rows| sender.send(rows).unwrap());
                        go(going, &sender.hangup(), sender);
                    });
                    until_it_fails(|| receiver.receive(&[VOCABULARY]).map(drop))
                });
                assert!(took < TIMEOUT / 2, "the sender, {going:?} at call {calls}: {took:?}, {error}");
            }
        }
        // One that is in a call, from another thread.
        let (mut receiver, sender) = lane(TIMEOUT);
        let hangup = receiver.hangup();
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(50));
                hangup.close();
            });
            let (error, took) = until_it_fails(|| receiver.receive(&[VOCABULARY]).map(drop));
            assert!(error.contains("hung up") && took < TIMEOUT / 2, "{took:?}, {error}");
        });
        drop(sender);
    });
}

/// `end` is what hangs up; that one stays for the call of the other.
fn go(going: Going, hangup: &Hangup, end: impl Sized) {
    if let Going::HangsUp = going {
        hangup.close();
        thread::sleep(Duration::from_millis(100));
    }
    drop(end);
}

fn an_end_that_hangs_closes_the_other_at_the_timeout() {
    leaving_nothing(|| {
        let scene = LLAMA.scene();
        let mut model = load(&scene);
        // Nobody notices that the other one is gone, as over NVLink.
        set(QUIET_ABORTS, 1);
        let (mut receiver, mut sender) = lane(SHORT);
        let (error, took) = until_it_fails(|| sender.send(some_rows(&mut model, 3)));
        assert!((SHORT..4 * SHORT).contains(&took), "{took:?}, {error}");
        let (error, took) = until_it_fails(|| receiver.receive(&[VOCABULARY]).map(drop));
        assert!((SHORT..4 * SHORT).contains(&took), "{took:?}, {error}");
        set(QUIET_ABORTS, 0);

        // Nobody comes to the other end.
        let lanes = CudaLanes::new(0, SHORT);
        let offer = lanes.offer().unwrap();
        for joined in [lanes.receiver(&offer).map(drop), lanes.sender(&lanes.offer().unwrap()).map(drop)] {
            let error = joined.unwrap_err().to_string();
            assert!(error.contains("not all ranks are there within 2s"), "{error}");
        }
    });
}

fn what_nccl_fails_at_or_hangs_in_ends_both() {
    leaving_nothing(|| {
        let scene = LLAMA.scene();
        let mut model = load(&scene);
        for (setting, timeout) in [(FAIL_LAUNCH, TIMEOUT), (HANG_LAUNCH, SHORT)] {
            for launch in [1, 2, 5] {
                set(setting, launch);
                let (mut receiver, mut sender) = lane(timeout);
                let (sent, received) = thread::scope(|scope| {
                    let receiving =
                        scope.spawn(move || until_it_fails(|| receiver.receive(&[VOCABULARY; 2]).map(drop)));
                    let sent = until_it_fails(|| sender.send(some_rows(&mut model, 2)));
                    (sent, receiving.join().unwrap())
                });
                set(setting, 0);
                for (error, took) in [sent, received] {
                    assert!(took < TIMEOUT / 2, "setting {setting} at launch {launch}: {took:?}, {error}");
                }
            }
        }
    });
}

fn what_is_no_row_and_no_lane_is_refused() {
    leaving_nothing(|| {
        let scene = LLAMA.scene();
        let mut model = load(&scene);
        let lanes = CudaLanes::new(0, SHORT);
        let error = lanes.sender(&[1, 2, 3]).err().expect("no id").to_string();
        assert!(error.contains("lane.nccl_id: 3 bytes are no id"), "{error}");
        let error = CudaLanes::new(7, SHORT).sender(&[0; 128]).err().expect("no such device").to_string();
        assert!(error.contains("device 7 of 2"), "{error}");

        let (_, detached) = rows(&mut model, 1, 1);
        let (_receiver, mut sender) = lane(TIMEOUT);
        let long = detached.into_iter().map(|row| (row, VOCABULARY + 1)).collect();
        let error = sender.send(long).unwrap_err().to_string();
        assert!(error.contains("92 logits of a row of 91"), "{error}");
        let error = sender.send(vec![(DeviceRow::new(vec![0.0f32]), 1)]).unwrap_err().to_string();
        assert!(error.contains("another kind of device"), "{error}");

        let first = 1; // the row that was just detached was the first list
        let (_, kept) = rows(&mut model, 1, Listing::KEPT.min(60));
        drop(kept);
        assert!(model.detach_rows(&[first]).is_ok(), "it is among the latest");
        for _ in 0..4 {
            drop(rows(&mut model, 1, 60));
        }
        let error = model.detach_rows(&[first]).unwrap_err().to_string();
        assert!(error.contains("not kept any more"), "{error}");
        drop(model);

        let options = CudaOptions {
            device: 0,
            kv_blocks: 4,
            block_tokens: 16,
            weights: WeightFormat::F32,
            graphs: false,
        };
        let mut part = CudaLlama::load_part(&scene.files, &options, Part::from((0, 2))).unwrap();
        let error = part.detach_rows(&[0]).unwrap_err().to_string();
        assert!(error.contains("each rank has a part of a row"), "{error}");
        let mut on_host = ScriptedForward::new(ScriptedOptions::default());
        let error = on_host.detach_rows(&[0]).unwrap_err().to_string();
        assert!(error.contains("on no device of its own"), "{error}");
    });
}
