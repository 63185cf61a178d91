//! Tokens that are to be believed, and all kinds that are not.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use serde_json::json;
use uniarm_fuzz::{JSON, fuzz};

use super::*;

const NOW: f64 = 1.8e9;

/// Made with OpenSSL; its key was thrown away.
const RSA_MODULUS: &str = "\
     u_aD2xqD2yJndf6YUetuw4BYnrbn7o30BzQkMkmhkLVpiLXdSDkMqVDo6ZX8Im4GhK5k2fN1RmmQNJa3zIYj46gNrae-b6iTaexDS3n4Zpx27Y \
     QhWRZOmn0np8OpjwxZlFqiKWkLgWynTaUqaicI1xU1ogHBBhNZV-cu8KPTh_E7ljlMfLjxz3uw_RVmmk2FZqLtAVg2vs0s-6VZly7XP2I073Wg \
     AD6MUkuHyYZpRzqOPMPQD_JIwtDqjRika7eYJf_W37mwr_gPi78omKNOin_TTAs0-VtTcqJs2Ha5ft-YFXqMoRFkOBBUHXDXRxHvPE8tjHRTnO \
     fZLgVYiHhKBw";
const RSA_TOKEN: &str = "\
     eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSJ9.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUub3JnIiwiYXVkIjpbIm90aGVyIiwidW5pY \
     XJtIl0sInN1YiI6InJvYm90IiwiZXhwIjo0MTAyNDQ0ODAwfQ.Vsv35-MJEflzfDwF9SNNr_HVeceAC8Q3aAzGWaFwLWunxThxnd4yY8bw5xar \
     rkfubmmLVHi4qpUH-wXBMfnK75k7FYK43Pl5qJKPM9x2VifRE2jZQsf9lFBrilcqmwK0YjMQ_87Sg8cRpeazaz6eU715VQ3Ndtlug5xCI-2i7o \
     g-Tmj4nBmeCuRpwYw-5EMg_LCkzyNLnaqYbuZMlI2UMfST1S-0j9LJoztUTOmJrNgVp8wyqeWzov4KRhBM9fIH5iejfw4D2h2hzARSkpwyGsyK \
     z9pDJAj1_krCwm7opbcYeygxI8n9eo_ZYlbnvsIVNb5JQO2VzkIzgcXwyQO_WA";

fn expected() -> Expected {
    Expected { issuer: "https://login.example.org".to_owned(), audience: "uniarm".to_owned() }
}

fn encode(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn claims() -> Value {
    json!({ "iss": "https://login.example.org", "aud": "uniarm", "sub": "robot", "exp": NOW + 300.0 })
}

struct Signer {
    pair: EcdsaKeyPair,
    random: SystemRandom,
}

impl Signer {
    fn new() -> Self {
        let random = SystemRandom::new();
        let kind = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self { pair: EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).unwrap(), random }
    }

    fn keys(&self) -> Keys {
        let point = self.pair.public_key().as_ref();
        let [x, y] = [&point[1..33], &point[33..]].map(|part| URL_SAFE_NO_PAD.encode(part));
        let set = json!({ "keys": [
            { "kty": "EC", "crv": "P-256", "kid": "now", "use": "sig", "alg": "ES256", "x": x, "y": y },
            { "kty": "RSA", "kid": "rsa", "n": RSA_MODULUS.replace([' ', '\n'], ""), "e": "AQAB" },
            { "kty": "EC", "crv": "secp256k1", "kid": "another kind", "x": x, "y": y },
            { "kty": "RSA", "kid": "for encryption", "use": "enc", "n": "AQAB", "e": "AQAB" },
        ]});
        Keys::read(&set.to_string()).unwrap()
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", encode(header), encode(claims));
        let seal = self.pair.sign(&self.random, signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(seal))
    }
}

#[test]
fn tokens_of_each_kind_of_key_are_believed() {
    let signer = Signer::new();
    let keys = signer.keys();
    assert_eq!(keys.count(), 2);
    let token = signer.sign(&json!({ "alg": "ES256", "kid": "now" }), &claims());
    assert_eq!(keys.verify(&token, &expected(), NOW).unwrap()["sub"], "robot");
    let rsa = keys.verify(&RSA_TOKEN.replace([' ', '\n'], ""), &expected(), NOW).unwrap();
    assert_eq!(rsa["sub"], "robot");

    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
    let x = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
    let set = json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "x": x }] });
    let signed = format!("{}.{}", encode(&json!({ "alg": "EdDSA" })), encode(&claims()));
    let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(pair.sign(signed.as_bytes())));
    let keys = Keys::read(&set.to_string()).unwrap();
    assert!(keys.verify(&token, &expected(), NOW).is_ok(), "the only key needs no name");
}

#[test]
fn whatever_else_comes_is_not_believed() {
    let signer = Signer::new();
    let keys = signer.keys();
    let header = json!({ "alg": "ES256", "kid": "now" });
    let with = |name: &str, value: Value| {
        let mut claims = claims();
        claims[name] = value;
        signer.sign(&header, &claims)
    };
    let good = signer.sign(&header, &claims());
    let (signed, seal) = good.rsplit_once('.').unwrap();
    let other_claims = format!("{}.{}.{seal}", encode(&header), encode(&json!({ "sub": "root" })));
    let malformed = TokenError::Malformed("");
    for (token, refusal) in [
        (Signer::new().sign(&header, &claims()), TokenError::Signature),
        (other_claims, TokenError::Signature),
        (format!("{signed}."), TokenError::Signature),
        (
            signer.sign(&json!({ "alg": "none", "kid": "now" }), &claims()),
            TokenError::Algorithm("none".into()),
        ),
        (
            signer.sign(&json!({ "alg": "HS256", "kid": "now" }), &claims()),
            TokenError::Algorithm("HS256".into()),
        ),
        (
            signer.sign(&json!({ "alg": "ES256", "kid": "rsa" }), &claims()),
            TokenError::Algorithm("ES256".into()),
        ),
        (signer.sign(&json!({ "alg": "ES256", "kid": "next" }), &claims()), TokenError::UnknownKey),
        (signer.sign(&json!({ "alg": "ES256" }), &claims()), TokenError::UnknownKey),
        (
            signer.sign(&json!({ "alg": "ES256", "kid": "now", "crit": ["b64"] }), &claims()),
            malformed.clone(),
        ),
        (with("exp", json!(NOW - 61.0)), TokenError::Expired),
        (with("exp", json!("later")), malformed.clone()),
        (with("exp", Value::Null), malformed.clone()),
        (with("nbf", json!(NOW + 61.0)), TokenError::Early),
        (with("iss", json!("https://login.example.com")), TokenError::Issuer),
        (with("aud", json!(["others"])), TokenError::Audience),
        (with("aud", Value::Null), TokenError::Audience),
        ("a.b.c".to_owned(), malformed.clone()),
        ("uniarm.0".to_owned(), malformed.clone()),
        (format!("{good}{}", "x".repeat(TOKEN_BYTES_MAX)), malformed),
    ] {
        let error = keys.verify(&token, &expected(), NOW).unwrap_err();
        let is_same = matches!((&error, &refusal), (TokenError::Malformed(_), TokenError::Malformed(_)));
        assert!(is_same || error == refusal, "{error:?} should be {refusal:?}: {token}");
    }
    assert!(
        keys.verify(&with("exp", json!(NOW - 59.0)), &expected(), NOW).is_ok(),
        "clocks may differ a little"
    );
    for set in ["", "[]", "{}", "{\"keys\": []}", "{\"keys\": [{\"kty\": \"oct\", \"k\": \"AQAB\"}]}"] {
        assert!(Keys::read(set).is_err(), "{set}");
    }
}

/// Three doors: whole tokens, claims under a good signature (a provider is a stranger, too), and key sets.
#[test]
fn tokens_of_strangers() {
    let signer = Signer::new();
    let (keys, header) = (signer.keys(), json!({ "alg": "ES256", "kid": "now" }));
    let good = signer.sign(&header, &claims());
    let said = |result: Result<Map<String, Value>, TokenError>| {
        result.err().map_or_else(String::new, |error| error.to_string())
    };
    let seeds = [good.clone().into_bytes(), RSA_TOKEN.replace([' ', '\n'], "").into_bytes()];
    fuzz("tokens", &seeds, &[".", "=", "e30", "eyJ"], |bytes| {
        said(keys.verify(&String::from_utf8_lossy(bytes), &expected(), NOW))
    });
    fuzz("claims", &[claims().to_string().into_bytes()], JSON, |bytes| {
        let signed = format!("{}.{}", encode(&header), URL_SAFE_NO_PAD.encode(bytes));
        let seal = signer.pair.sign(&signer.random, signed.as_bytes()).unwrap();
        said(keys.verify(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(seal)), &expected(), NOW))
    });
    let point = signer.pair.public_key().as_ref();
    let [x, y] = [&point[1..33], &point[33..]].map(|part| URL_SAFE_NO_PAD.encode(part));
    let set = json!({ "keys": [
        { "kty": "EC", "crv": "P-256", "kid": "now", "use": "sig", "alg": "ES256", "x": x, "y": y },
        { "kty": "RSA", "kid": "rsa", "n": RSA_MODULUS.replace([' ', '\n'], ""), "e": "AQAB" },
        { "kty": "OKP", "crv": "Ed25519", "x": x },
    ]});
    fuzz("key sets", &[set.to_string().into_bytes()], JSON, |bytes| {
        match Keys::read(&String::from_utf8_lossy(bytes)) {
            Ok(keys) => said(keys.verify(&good, &expected(), NOW)),
            Err(error) => error,
        }
    });
}
