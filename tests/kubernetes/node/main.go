// What stands between kubectl and a container runtime when somebody runs exec, attach or
// port-forward: the API server's proxies and the kubelet's, each built from the library that the
// real one is built from, before the one socket of the runtime. Pods are the sandboxes that the
// runtime lists; nothing else of a cluster is here.
//
//	node -cri SOCKET [-pass-websocket]
//
// prints the address of the API server, and serves until its standard input ends.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/proxy"
	apiserver "k8s.io/apiserver/pkg/util/proxy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// ttyAnnotation says of a container that it has a terminal, which CRI does not tell.
const ttyAnnotation = "tty"

type node struct {
	runtime cri.RuntimeServiceClient
	// The server itself, where the kubelet's paths are.
	self *url.URL
	// Whether a client's WebSocket reaches the runtime; otherwise the API server speaks SPDY to the
	// kubelet for it, as it does today.
	passWebSocket bool
}

func main() {
	log.SetFlags(0)
	socket := flag.String("cri", "", "socket of the runtime")
	pass := flag.Bool("pass-websocket", false, "hand WebSocket through to the runtime instead of translating it to SPDY")
	flag.Parse()
	connection, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	n := &node{
		runtime:       cri.NewRuntimeServiceClient(connection),
		self:          &url.URL{Scheme: "http", Host: listener.Addr().String()},
		passWebSocket: *pass,
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println(n.self)
	log.Fatal(http.Serve(listener, n.routes()))
}

func (n *node) routes() http.Handler {
	mux := http.NewServeMux()
	// The API server's face.
	mux.HandleFunc("GET /api", serveJSON(metav1.APIVersions{
		TypeMeta: metav1.TypeMeta{Kind: "APIVersions"},
		Versions: []string{"v1"},
	}))
	mux.HandleFunc("GET /apis", serveJSON(metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}))
	mux.HandleFunc("GET /api/v1", serveJSON(metav1.APIResourceList{
		TypeMeta:     metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"},
		GroupVersion: "v1",
		APIResources: []metav1.APIResource{{
			Name: "pods", SingularName: "pod", Namespaced: true, Kind: "Pod", ShortNames: []string{"po"}, Verbs: metav1.Verbs{"get"},
		}},
	}))
	const pod = "/api/v1/namespaces/{namespace}/pods/{pod}"
	mux.HandleFunc("GET "+pod, n.getPod)
	mux.HandleFunc(pod+"/exec", n.toKubelet("exec"))
	mux.HandleFunc(pod+"/attach", n.toKubelet("attach"))
	mux.HandleFunc(pod+"/portforward", n.toKubelet("portForward"))
	// The kubelet's.
	mux.HandleFunc("/exec/{namespace}/{pod}/{container}", n.stream(n.exec))
	mux.HandleFunc("/attach/{namespace}/{pod}/{container}", n.stream(n.attach))
	mux.HandleFunc("/portForward/{namespace}/{pod}", n.stream(n.portForward))
	return mux
}

func serveJSON(object any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(object); err != nil {
			log.Print(err)
		}
	}
}

// failure answers with an error as the proxies do.
type failure struct{}

func (failure) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

// sandbox is the newest ready sandbox of the pod that a request names.
func (n *node) sandbox(r *http.Request) (*cri.PodSandbox, error) {
	list, err := n.runtime.ListPodSandbox(r.Context(), &cri.ListPodSandboxRequest{
		Filter: &cri.PodSandboxFilter{State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}},
	})
	if err != nil {
		return nil, err
	}
	for _, sandbox := range list.Items {
		if sandbox.Metadata.Namespace == r.PathValue("namespace") && sandbox.Metadata.Name == r.PathValue("pod") {
			return sandbox, nil
		}
	}
	return nil, fmt.Errorf("no pod %s/%s", r.PathValue("namespace"), r.PathValue("pod"))
}

func (n *node) containers(ctx context.Context, sandbox *cri.PodSandbox) ([]*cri.Container, error) {
	list, err := n.runtime.ListContainers(ctx, &cri.ListContainersRequest{
		Filter: &cri.ContainerFilter{PodSandboxId: sandbox.Id},
	})
	if err != nil {
		return nil, err
	}
	return list.Containers, nil
}

func (n *node) getPod(w http.ResponseWriter, r *http.Request) {
	sandbox, err := n.sandbox(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	containers, err := n.containers(r.Context(), sandbox)
	if err != nil {
		failure{}.Error(w, r, err)
		return
	}
	pod := corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: sandbox.Metadata.Name, Namespace: sandbox.Metadata.Namespace},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, container := range containers {
		tty := container.Annotations[ttyAnnotation] == "true"
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
			Name: container.Metadata.Name, Stdin: true, TTY: tty,
		})
	}
	serveJSON(pod)(w, r)
}

// toKubelet is the API server's part: it proxies to the kubelet, and translates what kubelets do
// not speak.
func (n *node) toKubelet(what string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		query, options := r.URL.Query(), url.Values{}
		is := func(name string) bool { return query.Get(name) == "true" }
		for _, name := range [][2]string{{"stdin", "input"}, {"stdout", "output"}, {"stderr", "error"}, {"tty", "tty"}} {
			if is(name[0]) {
				options.Set(name[1], "1")
			}
		}
		options["command"] = query["command"]
		location := n.self.JoinPath(what, r.PathValue("namespace"), r.PathValue("pod"))
		if what != "portForward" {
			location = location.JoinPath(query.Get("container"))
		}
		location.RawQuery = options.Encode()
		upgrade := proxy.NewUpgradeAwareHandler(location, nil, false, true, failure{})
		upgrade.UseLocationHost = true
		if n.passWebSocket {
			upgrade.ServeHTTP(w, r)
			return
		}
		if what == "portForward" {
			tunnel := apiserver.NewTunnelingHandler(upgrade)
			apiserver.NewTranslatingHandler(upgrade, tunnel, wsstream.IsWebSocketRequestWithTunnelingProtocol).ServeHTTP(w, r)
			return
		}
		translator := apiserver.NewStreamTranslatorHandler(location, http.DefaultTransport, 0, apiserver.Options{
			Stdin: is("stdin"), Stdout: is("stdout"), Stderr: is("stderr"), Tty: is("tty"),
		})
		apiserver.NewTranslatingHandler(upgrade, translator, wsstream.IsWebSocketRequestWithStreamCloseProtocol).ServeHTTP(w, r)
	}
}

// stream is the kubelet's part: it asks the runtime for a URL and hands the connection on to it.
func (n *node) stream(ask func(*http.Request, *cri.PodSandbox) (string, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		sandbox, err := n.sandbox(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		address, err := ask(r, sandbox)
		if err != nil {
			failure{}.Error(w, r, err)
			return
		}
		location, err := url.Parse(address)
		if err != nil {
			failure{}.Error(w, r, err)
			return
		}
		proxy.NewUpgradeAwareHandler(location, nil, false, true, failure{}).ServeHTTP(w, r)
	}
}

func (n *node) container(r *http.Request, sandbox *cri.PodSandbox) (string, error) {
	containers, err := n.containers(r.Context(), sandbox)
	if err != nil {
		return "", err
	}
	for _, container := range containers {
		if container.Metadata.Name == r.PathValue("container") {
			return container.Id, nil
		}
	}
	return "", fmt.Errorf("no container %q in the pod", r.PathValue("container"))
}

func (n *node) exec(r *http.Request, sandbox *cri.PodSandbox) (string, error) {
	id, err := n.container(r, sandbox)
	if err != nil {
		return "", err
	}
	query := r.URL.Query()
	answer, err := n.runtime.Exec(r.Context(), &cri.ExecRequest{
		ContainerId: id,
		Cmd:         query["command"],
		Tty:         query.Has("tty"),
		Stdin:       query.Has("input"),
		Stdout:      query.Has("output"),
		Stderr:      query.Has("error"),
	})
	return answer.GetUrl(), err
}

func (n *node) attach(r *http.Request, sandbox *cri.PodSandbox) (string, error) {
	id, err := n.container(r, sandbox)
	if err != nil {
		return "", err
	}
	query := r.URL.Query()
	answer, err := n.runtime.Attach(r.Context(), &cri.AttachRequest{
		ContainerId: id,
		Tty:         query.Has("tty"),
		Stdin:       query.Has("input"),
		Stdout:      query.Has("output"),
		Stderr:      query.Has("error"),
	})
	return answer.GetUrl(), err
}

func (n *node) portForward(r *http.Request, sandbox *cri.PodSandbox) (string, error) {
	request := &cri.PortForwardRequest{PodSandboxId: sandbox.Id}
	for port := range strings.SplitSeq(r.URL.Query().Get("port"), ",") {
		if port == "" {
			continue
		}
		number, err := strconv.ParseInt(port, 10, 32)
		if err != nil {
			return "", err
		}
		request.Port = append(request.Port, int32(number))
	}
	answer, err := n.runtime.PortForward(r.Context(), request)
	return answer.GetUrl(), err
}
