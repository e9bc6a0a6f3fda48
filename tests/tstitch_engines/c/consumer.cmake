# Installs the library into a fresh prefix, builds a project of its own against it and runs what comes out.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${work}")
run("${CMAKE_COMMAND}" --install "${build}" --prefix "${work}/prefix")
run("${CMAKE_COMMAND}" -G "${generator}" -S "${source}" -B "${work}/build" "-DCMAKE_PREFIX_PATH=${work}/prefix"
    "-DCMAKE_C_COMPILER=${compiler}" "-DCMAKE_C_FLAGS=${flags}" "-Dversion=${version}" "-Dfatbin=${fatbin}")
run("${CMAKE_COMMAND}" --build "${work}/build")
run("${work}/build/walk")
