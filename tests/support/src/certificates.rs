//! Certificates for servers that speak TLS, and the authority that a client trusts.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair, date_time_ymd,
};

/// The files of one certificate and its key.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// An authority, and what it has signed.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
    name: String,
}

impl Authority {
    /// Makes an authority, whose files go to this directory.
    ///
    /// # Panics
    ///
    /// When they can't be written.
    pub fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = called(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let authority = Self { issuer, dir: dir.to_owned(), name: name.to_owned() };
        std::fs::write(authority.certificate(), authority.issuer.pem()).expect("a file");
        authority
    }

    /// The file that holds its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.join(format!("{}.pem", self.name))
    }

    /// Signs a certificate for a server of this name.
    pub fn sign(&self, host: &str) -> Certificate {
        self.sign_until(host, 4096)
    }

    /// Signs a certificate that has expired.
    pub fn sign_expired(&self, host: &str) -> Certificate {
        self.sign_until(host, 2020)
    }

    fn sign_until(&self, host: &str, year: i32) -> Certificate {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([host.to_owned()]).expect("a name");
        params.distinguished_name = called(host);
        (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(year, 1, 1));
        let signed = params.signed_by(&key, &self.issuer).expect("a certificate");
        let file = |kind| self.dir.join(format!("{}-{host}-{year}.{kind}", self.name));
        let files = Certificate { certificate: file("crt"), key: file("key") };
        std::fs::write(&files.certificate, signed.pem()).expect("a file");
        std::fs::write(&files.key, key.serialize_pem()).expect("a file");
        files
    }
}

fn called(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
