//! Tokens of an OpenID provider at the front door: one that this test plays, with discovery and keys that change.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use serde_json::{Value, json};

use crate::harness::{Cluster, PROMPTED, http_get_as};

/// A key that is not known is looked for every 10 s.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(40);

/// Answers discovery, and a set of keys that may change.
struct Provider {
    url: String,
    keys: Arc<Mutex<Value>>,
}

struct Signer {
    pair: EcdsaKeyPair,
    name: &'static str,
}

// === impl Provider ===

impl Provider {
    fn start(signer: &Signer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let keys = Arc::new(Mutex::new(signer.keys()));
        let (own, served) = (url.clone(), Arc::clone(&keys));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let path = request.next().unwrap_or_default();
                let body = match path.split(' ').nth(1) {
                    Some("/.well-known/openid-configuration") => {
                        json!({ "issuer": own, "jwks_uri": format!("{own}/keys"), "more": true })
                    }
                    Some("/keys") => served.lock().unwrap().clone(),
                    _ => Value::Null,
                };
                request.take_while(|line| !line.is_empty()).for_each(drop);
                let body = body.to_string();
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
            }
        });
        Self { url, keys }
    }

    /// The claims of a good token.
    fn claims(&self, subject: &str) -> Value {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        json!({ "iss": self.url, "aud": "uniarm", "sub": subject, "exp": now + 600 })
    }
}

// === impl Signer ===

impl Signer {
    fn new(name: &'static str) -> Self {
        let (kind, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self { pair: EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).unwrap(), name }
    }

    fn keys(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let [x, y] = [&point[1..33], &point[33..]].map(|part| URL_SAFE_NO_PAD.encode(part));
        json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": self.name, "x": x, "y": y }] })
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({ "alg": "ES256", "kid": self.name });
        let [header, claims] = [&header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let signed = format!("{header}.{claims}");
        let seal = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(seal))
    }
}

fn status(cluster: &Cluster, token: &str) -> (u16, String) {
    let answer = http_get_as(&cluster.http, "/v1/models", &format!("Authorization: Bearer {token}\r\n"));
    (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
}

#[test]
fn tokens_of_a_provider_let_their_subjects_in_and_nobody_else() {
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let provider = Provider::start(&old);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenants.toml");
    let text = format!(
        "[oidc]\nissuer = \"{}\"\naudience = \"uniarm\"\n\
         [[tenants]]\nname = \"robots\"\nsubjects = [\"robot-1\", \"robot-2\"]\nreward_models = [\"concise\"]\n",
        provider.url
    );
    std::fs::write(&file, text).unwrap();
    let cluster = Cluster::up(&[&PROMPTED[..], &["--tenants", file.to_str().unwrap()]].concat());
    let until = |reached: &dyn Fn() -> bool| {
        let began = Instant::now();
        while !reached() {
            assert!(began.elapsed() < FOLLOWED_WITHIN, "the provider is not followed");
            thread::sleep(Duration::from_millis(100));
        }
    };
    let token = old.sign(&provider.claims("robot-1"));
    until(&|| status(&cluster, &token).0 == 200);
    let (_, listed) = status(&cluster, &token);
    assert!(
        listed.contains("concise") && !listed.contains("positive"),
        "a token's tenant has its rights: {listed}"
    );

    let mut expired = provider.claims("robot-1");
    expired["exp"] = json!(1_600_000_000);
    let mut elsewhere = provider.claims("robot-1");
    elsewhere["aud"] = json!("billing");
    for (token, said) in [
        (old.sign(&provider.claims("stranger")), "names nobody who is known"),
        (old.sign(&expired), "has expired"),
        (old.sign(&elsewhere), "another audience"),
        (Signer::new("old").sign(&provider.claims("robot-1")), "wrong signature"),
        (new.sign(&provider.claims("robot-1")), "a key that its issuer does not name"),
        ("uniarm_0".to_owned(), "API key is not known"),
    ] {
        let (code, answer) = status(&cluster, &token);
        assert!(code == 401 && answer.contains(said), "{said}: {answer}");
    }

    // The provider changes its key: tokens of the new one are good soon, those of the old one no more.
    *provider.keys.lock().unwrap() = new.keys();
    let fresh = new.sign(&provider.claims("robot-2"));
    until(&|| status(&cluster, &fresh).0 == 200);
    assert_eq!(status(&cluster, &token).0, 401);
}
