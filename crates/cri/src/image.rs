//! ImageService.

use std::collections::BTreeMap;

use gantry_cri_api::v1 as cri;
use gantry_cri_api::v1::image_service_server::ImageService;
use gantry_images::Credentials;
use gantry_supervisor::Supervisor;
use serde_json::json;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::inflight::about;
use crate::status::{invalid, status};
use crate::stream::{Chunks, chunks};

type Answer<T> = Result<Response<T>, Status>;

pub struct Images {
    supervisor: Supervisor,
}

impl Images {
    pub fn new(supervisor: Supervisor) -> Self {
        Self { supervisor }
    }

    fn images(&self) -> &gantry_images::Images {
        self.supervisor.images()
    }

    /// Who makes roots for this runtime handler, which a pull unpacks the image for (KEP-4216: the
    /// empty name is the default one, an unknown name is refused).
    fn snapshotter(&self, handler: &str) -> Result<Option<String>, Status> {
        match self.supervisor.settings().handler(handler) {
            Some(found) => Ok(Some(found.snapshotter.clone())),
            // Of a node without any.
            None if handler.is_empty() => Ok(None),
            None => Err(invalid(
                "image.runtime_handler",
                format!("no runtime handler {handler:?} is configured"),
            )),
        }
    }

    /// All images, or the one that the filter names.
    fn listed(&self, filter: Option<cri::ImageFilter>) -> Result<Vec<cri::Image>, Status> {
        let name = filter
            .and_then(|filter| filter.image)
            .map(|image| image.image);
        match name.filter(|name| !name.is_empty()) {
            None => Ok(self
                .images()
                .list()
                .iter()
                .map(|image| convert::image(image))
                .collect()),
            Some(name) => {
                let image = self.images().status(&name).map_err(status)?;
                Ok(image.iter().map(|image| convert::image(image)).collect())
            }
        }
    }
}

fn name(image: Option<cri::ImageSpec>) -> Result<String, Status> {
    let name = image.map(|image| image.image).unwrap_or_default();
    if name.is_empty() {
        Err(invalid("image.image", "is empty"))
    } else {
        Ok(name)
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Answer<cri::ListImagesResponse> {
        let images = self.listed(request.into_inner().filter)?;
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    type StreamImagesStream = Chunks<cri::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.listed(request.into_inner().filter)?;
        Ok(Response::new(chunks(images, |images| {
            cri::StreamImagesResponse { images }
        })))
    }

    /// An image that is not there is an empty answer, not an error.
    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let found = self
            .images()
            .status(&name(request.image)?)
            .map_err(status)?;
        let mut info = BTreeMap::new();
        if let Some(image) = found.as_ref().filter(|_| request.verbose) {
            let chain: Vec<_> = image.layers.iter().map(ToString::to_string).collect();
            let facts = json!({ "chainIDs": chain, "imageSpec": image_spec(&image.config) });
            info.insert("info".to_owned(), facts.to_string());
        }
        let image = found.as_deref().map(convert::image);
        Ok(Response::new(cri::ImageStatusResponse { image, info }))
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let image = request.image.as_ref();
        let handler = image.map(|image| image.runtime_handler.as_str());
        let pull = gantry_images::PullRequest {
            snapshotter: self.snapshotter(handler.unwrap_or_default())?,
            reference: name(request.image)?,
            credentials: request.auth.map(credentials).unwrap_or_default(),
        };
        about(&pull.reference);
        let image_ref = self.images().pull(pull).await.map_err(status)?;
        Ok(Response::new(cri::PullImageResponse { image_ref }))
    }

    /// Removes the image under all its names; one that is not there is removed.
    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        let name = name(request.into_inner().image)?;
        about(&name);
        let in_use = self.supervisor.layers_in_use();
        self.images().remove(&name, in_use).await.map_err(status)?;
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Answer<cri::ImageFsInfoResponse> {
        let images = self.images().fs_info();
        let containers = self.images().container_fs_info().map_err(status)?;
        // Mostly images and containers share one file system. The kubelet looks at the first.
        let containers = containers.map_or_else(|| images.clone(), |own| vec![own]);
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: images.into_iter().map(file_system).collect(),
            container_filesystems: containers.into_iter().map(file_system).collect(),
        }))
    }
}

fn file_system(info: gantry_images::FsInfo) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp: gantry_supervisor::now_ns(),
        fs_id: Some(cri::FilesystemIdentifier {
            mountpoint: info.mountpoint.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(cri::UInt64Value {
            value: info.used_bytes,
        }),
        inodes_used: Some(cri::UInt64Value {
            value: info.inodes_used,
        }),
    }
}

/// The configuration under the names of the OCI image specification.
fn image_spec(config: &gantry_images::ImageConfig) -> serde_json::Value {
    json!({
        "config": {
            "User": config.user,
            "Env": config.env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "WorkingDir": config.working_dir,
            "Labels": config.labels,
            "Volumes": config.volumes,
            "ExposedPorts": config.exposed_ports,
            "StopSignal": config.stop_signal,
        }
    })
}

fn credentials(auth: cri::AuthConfig) -> Credentials {
    Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}
