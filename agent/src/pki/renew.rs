//! `roamcast pki renew`: new keys and certificates that replace expiring ones.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::sign::io_error;
use super::{IssueRequest, Issued, PkiError, Validity, certify, is_name, names, refuse_one_ca};
use crate::role::Role;

/// Issues new certificates with the name, role and addresses of the existing ones, and replaces
/// those.
///
/// # Errors
///
/// [`PkiError::NotIssued`], and the errors of [`super::issue`] except `Exists`.
pub fn renew(directory: &Path, name: &str, validity: Validity) -> Result<Issued, PkiError> {
    refuse_one_ca(directory)?;
    let name = name.to_ascii_lowercase();
    let (role, addresses) = certified(directory, &name)?;
    let request = IssueRequest {
        name: name.clone(),
        role,
        addresses,
        validity,
    };
    let names = names(&request)?;
    let [fresh, old] = ["new", "old"].map(|what| directory.join(format!(".{name}.{what}")));
    // An earlier attempt may have left these directories.
    for left in [&fresh, &old] {
        if left.exists() {
            fs::remove_dir_all(left).map_err(io_error("remove", left))?;
        }
    }
    certify(directory, &request, &names, fresh.clone())?;
    let host = directory.join(&name);
    fs::rename(&host, &old).map_err(io_error("move", &host))?;
    fs::rename(&fresh, &host).map_err(io_error("move", &fresh))?;
    fs::remove_dir_all(&old).map_err(io_error("remove", &old))?;
    Ok(Issued::at(host, role))
}

/// Returns role and addresses of an issued certificate.
fn certified(directory: &Path, name: &str) -> Result<(Role, Vec<IpAddr>), PkiError> {
    let not_issued = || PkiError::NotIssued {
        directory: directory.to_owned(),
        name: name.to_owned(),
    };
    if !is_name(name) {
        return Err(not_issued());
    }
    let path = Issued::at(directory.join(name), Role::Relay)
        .signalling
        .certificate;
    let certificate = CertificateDer::from_pem_file(&path).map_err(|_| not_issued())?;
    let role = Role::of_certificate(&certificate).map_err(|_| not_issued())?;
    let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|_| not_issued())?;
    let named = parsed.subject_alternative_name().ok().flatten();
    let named = named.map(|extension| &extension.value.general_names);
    let addresses = named.into_iter().flatten().filter_map(|name| match name {
        GeneralName::IPAddress(bytes) => address(bytes),
        _ => None,
    });
    Ok((role, addresses.collect()))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v6.or_else(|_| <[u8; 4]>::try_from(bytes).map(IpAddr::from))
        .ok()
}
