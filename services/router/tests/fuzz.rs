//! Files of tenants that somebody wrote in a hurry.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use uniarm_fuzz::{fuzz, scratch};
use uniarm_router::tenants::Tenants;

const FILE: &str = r#"[[tenants]]
name = "a"
keys = ["sha256:0000000000000000000000000000000000000000000000000000000000000001"]
base_models = ["m"]
requests_max = 64
requests_per_minute = 600
tokens_per_minute = 100000
priority = "normal"
guidance_min = 1.0
[tenants.floors]
harmless = 0.5
"#;

#[test]
fn tenants_of_strangers() {
    let folder = tempfile::tempdir_in(scratch()).unwrap();
    let path = folder.path().join("tenants.toml");
    fuzz(
        "tenants",
        &[FILE.into()],
        &["[[tenants]]", "nan", "inf", "-1", "\"\"", "= ", "\n", "sha256:"],
        |bytes| {
            std::fs::write(&path, bytes).unwrap();
            let opened = Tenants::open(&path);
            if let Ok(tenants) = &opened {
                assert!(tenants.identify(Some("Bearer x")).is_err());
            }
            opened.err().map_or_else(String::new, |error| error.to_string())
        },
    );
}
