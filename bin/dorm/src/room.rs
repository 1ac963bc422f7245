//! What Dormouse takes of the host's disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dormouse_api::Phase;
use dormouse_client::Home;

use crate::context::Context;
use crate::error::Failure;
use crate::format::listing::{Listing, Row};
use crate::format::units;

/// Unit of a file's `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;

const COLUMNS: &[(&str, &str)] =
    &[("Type", "ON THE HOST"), ("TotalCount", "TOTAL"), ("Active", "ACTIVE"), ("Size", "SIZE")];

/// Stores, snapshots, templates and guest images: how many, how many of them are in use, and what they take. Wakes nothing.
pub(crate) async fn of_host(context: &Context) -> Result<Listing, Failure> {
    let service = context.service().await?;
    let (sessions, templates) = (service.sessions().await?, service.templates().await?);
    let snapshots: Vec<_> = sessions.iter().filter_map(|info| info.snapshot.as_ref()).collect();
    let store = std::env::var_os("DORM_IMAGES")
        .map_or_else(|| Ok(Home::from_env()?.images()), |path| Ok::<_, Failure>(PathBuf::from(path)))?;
    let images = guest_images(&store);
    let used: u64 = sessions.iter().map(|info| info.storage.used_bytes).sum();
    let up = sessions.iter().filter(|info| info.vm.phase != Phase::Absent).count();
    let fit = snapshots.iter().filter(|snapshot| snapshot.unfit.is_none()).count();
    let mut listing = Listing::new(COLUMNS, &["Type", "TotalCount", "Active", "Size"]);
    for (kind, total, active, bytes) in [
        ("Stores", sessions.len(), up, used),
        ("Snapshots", snapshots.len(), fit, snapshots.iter().map(|snapshot| snapshot.used_bytes).sum()),
        (
            "Templates",
            templates.len(),
            templates.len(),
            templates.iter().map(|template| template.used_bytes).sum(),
        ),
        ("Guest Images", images.len(), usize::from(!images.is_empty()), images.iter().sum()),
    ] {
        listing.push(
            Row::default()
                .with("Type", kind)
                .with("TotalCount", total.to_string())
                .with("Active", active.to_string())
                .with("Size", size(bytes)),
        );
    }
    Ok(listing)
}

#[expect(clippy::cast_precision_loss, reason = "it is shown in four digits")]
fn size(bytes: u64) -> String {
    units::size_in_four_digits(bytes as f64)
}

/// What each image of a store takes, in bytes.
fn guest_images(store: &Path) -> Vec<u64> {
    let images = fs::read_dir(store).into_iter().flatten().flatten();
    images
        // `newest` is a link to one of them.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|image| {
            let files = fs::read_dir(image.path()).into_iter().flatten().flatten();
            files.filter_map(|file| file.metadata().ok()).map(|file| file.blocks() * BLOCK_BYTES).sum()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_image_is_counted_once_with_what_its_files_take() {
        let store = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            fs::create_dir(store.path().join(name)).unwrap();
            fs::write(store.path().join(name).join("root.erofs"), vec![1; 100_000]).unwrap();
        }
        fs::write(store.path().join("newest"), "one").unwrap();
        let images = guest_images(store.path());
        assert!(images.len() == 2 && images.iter().all(|bytes| *bytes >= 100_000), "{images:?}");
        assert!(guest_images(&store.path().join("nothing")).is_empty());
    }
}
