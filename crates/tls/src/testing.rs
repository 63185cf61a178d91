//! An authority of a test's own, and the certificates that it issues.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::Identity;

/// Signs certificates, and says in a file who it is.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    /// PEM
    pub file: PathBuf,
}

impl Authority {
    /// # Panics
    /// When the folder cannot be written.
    #[must_use]
    pub fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let file = folder.join(format!("{name}.pem"));
        let own = params.self_signed(&key).expect("an authority signs itself");
        std::fs::write(&file, own.pem()).expect("the folder can be written");
        Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), file }
    }

    /// Files of a certificate for these hosts, good for servers and clients, and of its key. The files of an earlier one
    /// with that name are replaced.
    ///
    /// # Panics
    /// When the folder cannot be written.
    #[must_use]
    pub fn issue(&self, name: &str, hosts: &[&str]) -> Identity {
        self.issue_until(name, hosts, 4000)
    }

    /// The same, of a certificate that has expired.
    ///
    /// # Panics
    /// When the folder cannot be written.
    #[must_use]
    pub fn issue_expired(&self, name: &str, hosts: &[&str]) -> Identity {
        self.issue_until(name, hosts, 2020)
    }

    fn issue_until(&self, name: &str, hosts: &[&str], year: i32) -> Identity {
        let key = KeyPair::generate().expect("a key can be made");
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("hosts have names");
        // Not its authority's: OpenSSL would take it for one that signed itself.
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).expect("the authority signs");
        let write = |kind: &str, text: String| {
            let path = self.folder.join(format!("{name}.{kind}"));
            std::fs::write(path.with_extension("fresh"), text).expect("the folder can be written");
            std::fs::rename(path.with_extension("fresh"), &path).expect("the folder can be written");
            path
        };
        let (certificate, key) = (write("crt", certificate.pem()), write("key", key.serialize_pem()));
        Identity { authority: self.file.clone(), certificate, key }
    }
}
