//! What `uniarm doctor` says of this machine, of a model, and of a store that is there or not.

use std::process::Command;

use serde_json::Value;
use uniarm_cluster::testing::EtcdServer;

use crate::harness::{demo_model, free_address, machine};

/// Its findings by name, and whether it ended well.
fn doctor(flags: &[&str]) -> (Value, bool) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_uniarm")).args(["doctor", "--json"]).args(flags).output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(said["healthy"], output.status.success());
    (said["findings"].clone(), output.status.success())
}

fn finding<'a>(findings: &'a Value, what: &str) -> &'a Value {
    let found = findings.as_array().unwrap().iter().find(|finding| finding["what"] == what);
    found.unwrap_or_else(|| panic!("nothing is said of {what}: {findings}"))
}

#[test]
fn a_machine_that_serves_is_found_in_order() {
    let _machine = machine();
    let Some(etcd) = EtcdServer::start() else { return };
    let store = etcd.address();
    let (findings, is_well) = doctor(&["--model", demo_model(), "--store", &store]);
    assert!(is_well, "{findings}");
    for (area, what) in
        [("machine", "processor"), ("machine", "memory rate"), ("model", "chat template"), ("store", &store)]
    {
        let found = finding(&findings, what);
        assert_eq!((&found["area"], &found["state"]), (&area.into(), &"ok".into()), "{found}");
    }
    // There or not, each library is named.
    for what in ["kernels", "NCCL"] {
        assert_eq!(finding(&findings, what)["area"], "gpu");
    }
    let decoding = finding(&findings, "decoding")["detail"].as_str().unwrap();
    let rate: f64 = decoding.split(' ').next().unwrap().parse().unwrap();
    assert!(rate > 1.0, "{decoding}");
}

#[test]
fn what_was_asked_for_and_does_not_work_is_named_with_what_to_do() {
    let nobody = format!("etcd://{}", free_address());
    let (findings, is_well) = doctor(&["--model", "/nowhere", "--store", &nobody]);
    assert!(!is_well);
    for what in ["/nowhere", &nobody] {
        let found = finding(&findings, what);
        assert_eq!(found["state"], "failed", "{found}");
        assert!(!found["advice"].as_str().unwrap().is_empty(), "{found}");
    }
}
