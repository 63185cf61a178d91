//! Tokens of an OpenID provider: signed JSON (RFC 7519), checked against the provider's public keys (RFC 7517).
//!
//! Only what a public key can check is taken: a token without a signature, or with a shared secret's, is none. The
//! arithmetic is ring's.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{
    self, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Longer ones are refused before they are read.
const TOKEN_BYTES_MAX: usize = 16 << 10;

/// Keys of a provider that are looked at.
const KEYS_MAX: usize = 64;

/// Clocks of two machines may differ by so many seconds.
const LEEWAY_S: f64 = 60.0;

/// The public keys of a provider, by their names.
#[derive(Debug, Default)]
pub(super) struct Keys(HashMap<String, Key>);

#[derive(Debug)]
struct Key {
    /// The only algorithm that it is for, where it says so.
    algorithm: Option<String>,
    material: Material,
}

#[derive(Debug)]
enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// What a token has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) issuer: String,
    pub(super) audience: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum TokenError {
    #[error("is no signed token: {0}")]
    Malformed(&'static str),
    #[error("is signed with {0:?}, which is not taken")]
    Algorithm(String),
    /// Perhaps a new one.
    #[error("is signed with a key that its issuer does not name")]
    UnknownKey,
    #[error("has a wrong signature")]
    Signature,
    #[error("has expired")]
    Expired,
    #[error("is not valid yet")]
    Early,
    #[error("is of another issuer")]
    Issuer,
    #[error("is for another audience")]
    Audience,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    /// Extensions that must be understood; none is.
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

/// RFC 7517 and 7518: of each kind of key what checks a signature.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

// === impl Keys ===

impl Keys {
    /// Reads a key set. Keys of kinds that are not known are left out: a provider may have more than one needs here.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let set: KeySet =
            serde_json::from_str(text).map_err(|error| format!("is no set of keys: {error}"))?;
        let mut keys = HashMap::new();
        for value in set.keys.into_iter().take(KEYS_MAX) {
            let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { continue };
            if jwk.usage.as_deref().is_some_and(|usage| usage != "sig") {
                continue;
            }
            if let Some(material) = jwk.material() {
                keys.insert(jwk.kid.unwrap_or_default(), Key { algorithm: jwk.alg, material });
            }
        }
        match keys.is_empty() {
            true => Err("has no key that a signature could be checked with".to_owned()),
            false => Ok(Self(keys)),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// What a token says, if it is to be believed. `now`: seconds since 1970.
    pub(super) fn verify(
        &self,
        token: &str,
        expected: &Expected,
        now: f64,
    ) -> Result<Map<String, Value>, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::Malformed("it is too long"));
        }
        let (signed, seal) = token.rsplit_once('.').ok_or(TokenError::Malformed("it has no signature"))?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed("it has two parts"))?;
        let header: Header = part(header)?;
        if header.crit.is_some() {
            return Err(TokenError::Malformed("it has extensions"));
        }
        let key = self.named(header.kid.as_deref()).ok_or(TokenError::UnknownKey)?;
        let seal = URL_SAFE_NO_PAD.decode(seal).map_err(|_| TokenError::Signature)?;
        key.check(&header.alg, signed.as_bytes(), &seal)?;
        let claims: Map<String, Value> = part(claims)?;
        expected.check(&claims, now)?;
        Ok(claims)
    }

    /// A token that names no key means the only one.
    fn named(&self, name: Option<&str>) -> Option<&Key> {
        match name {
            Some(name) => self.0.get(name),
            None if self.0.len() == 1 => self.0.values().next(),
            None => None,
        }
    }
}

fn part<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, TokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::Malformed("a part is not base64url"))?;
    serde_json::from_slice(&bytes).map_err(|_| TokenError::Malformed("a part is not what it should be"))
}

// === impl Jwk ===

impl Jwk {
    fn material(&self) -> Option<Material> {
        let bytes =
            |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?.trim_end_matches('=')).ok();
        let point = || Some([&[4][..], &bytes(&self.x)?, &bytes(&self.y)?].concat());
        match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => Some(Material::Rsa { n: bytes(&self.n)?, e: bytes(&self.e)? }),
            ("EC", Some("P-256")) => Some(Material::P256(point()?)),
            ("EC", Some("P-384")) => Some(Material::P384(point()?)),
            ("OKP", Some("Ed25519")) => Some(Material::Ed25519(bytes(&self.x)?)),
            _ => None,
        }
    }
}

// === impl Key ===

impl Key {
    fn check(&self, algorithm: &str, signed: &[u8], seal: &[u8]) -> Result<(), TokenError> {
        let other = || TokenError::Algorithm(algorithm.chars().take(16).collect());
        if self.algorithm.as_deref().is_some_and(|own| own != algorithm) {
            return Err(other());
        }
        let with = |kind: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(kind, key).verify(signed, seal)
        };
        let checked = match (&self.material, algorithm) {
            (Material::Rsa { n, e }, _) => {
                let kind = rsa(algorithm).ok_or_else(other)?;
                RsaPublicKeyComponents { n, e }.verify(kind, signed, seal)
            }
            (Material::P256(point), "ES256") => with(&signature::ECDSA_P256_SHA256_FIXED, point),
            (Material::P384(point), "ES384") => with(&signature::ECDSA_P384_SHA384_FIXED, point),
            (Material::Ed25519(key), "EdDSA") => with(&signature::ED25519, key),
            _ => return Err(other()),
        };
        checked.map_err(|_| TokenError::Signature)
    }
}

fn rsa(algorithm: &str) -> Option<&'static RsaParameters> {
    Some(match algorithm {
        "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
        "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
        "RS512" => &signature::RSA_PKCS1_2048_8192_SHA512,
        "PS256" => &signature::RSA_PSS_2048_8192_SHA256,
        "PS384" => &signature::RSA_PSS_2048_8192_SHA384,
        "PS512" => &signature::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

// === impl Expected ===

impl Expected {
    fn check(&self, claims: &Map<String, Value>, now: f64) -> Result<(), TokenError> {
        let seconds = |name: &str| claims.get(name).map(|value| value.as_f64());
        // A token that is good for ever is one that nobody can take back.
        match seconds("exp") {
            Some(Some(end)) if now < end + LEEWAY_S => {}
            Some(Some(_)) => return Err(TokenError::Expired),
            _ => return Err(TokenError::Malformed("exp is missing, or no number")),
        }
        match seconds("nbf") {
            None => {}
            Some(Some(begin)) if now >= begin - LEEWAY_S => {}
            Some(Some(_)) => return Err(TokenError::Early),
            Some(None) => return Err(TokenError::Malformed("nbf is no number")),
        }
        if claims.get("iss").and_then(Value::as_str) != Some(&self.issuer) {
            return Err(TokenError::Issuer);
        }
        let is_meant = match claims.get("aud") {
            Some(Value::String(one)) => *one == self.audience,
            Some(Value::Array(several)) => several.iter().any(|one| one.as_str() == Some(&self.audience)),
            _ => false,
        };
        if is_meant { Ok(()) } else { Err(TokenError::Audience) }
    }
}

#[cfg(test)]
mod tests;
