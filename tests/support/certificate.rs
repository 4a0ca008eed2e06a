//! Certificates of the signalling's CA that `roamcast pki` does not issue.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use roamcast::net::tls::TlsFiles;

/// Certifies these names and URIs with the CA that `roamcast pki init` made in `pki`.
pub fn certify(pki: &Path, names: &[&str], uris: &[&str]) -> TlsFiles {
    let read = |path: &str| fs::read_to_string(pki.join(path)).unwrap();
    let ca_key = KeyPair::from_pem(&read("signalling/private/cakey.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("signalling/cacert.pem"), ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let all: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let name = all.join("-");
    let mut params = CertificateParams::new(all).unwrap();
    let address = SanType::IpAddress(Ipv6Addr::LOCALHOST.into());
    params.subject_alt_names.push(address);
    for &uri in uris {
        let uri = SanType::URI(uri.try_into().unwrap());
        params.subject_alt_names.push(uri);
    }
    let files = TlsFiles {
        ca: pki.join("signalling/cacert.pem"),
        certificate: pki.join(format!("{name}.pem")),
        key: pki.join(format!("{name}.key")),
        crl: pki.join("signalling/crl.pem"),
    };
    let certificate = params.signed_by(&key, &issuer).unwrap();
    fs::write(&files.certificate, certificate.pem()).unwrap();
    fs::write(&files.key, key.serialize_pem()).unwrap();
    files
}
