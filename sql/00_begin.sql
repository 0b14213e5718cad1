-- Begins the installation, which is one transaction: installers take turns, and from here on every name means the
-- first schema of the installer's search_path, never a temporary table.
--
-- Raises   invalid_schema_name (3F000)  search_path names no schema that exists

DO $$
DECLARE
    v_table  text;
    v_schema name;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE invalid_schema_name
            USING MESSAGE = 'search_path names no schema that exists: expected the one to install into';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    RAISE NOTICE USING MESSAGE = format('Beacon Stop goes into schema %I of database %I', current_schema(), current_database());

    -- Tables that are further on in search_path are not those that the functions will see.
    FOREACH v_table IN ARRAY '{jobs,executions}'::text[] LOOP
        SELECT n.nspname INTO v_schema
        FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = to_regclass(v_table) AND n.nspname <> current_schema() AND c.relpersistence <> 't';
        IF FOUND THEN
            RAISE WARNING USING
                MESSAGE = format('a new table %s is made in schema %I, although schema %I has one already',
                                 v_table, current_schema(), v_schema),
                HINT = format('If that one is meant, put %I first in search_path and install again.', v_schema);
        END IF;
    END LOOP;

    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
    PERFORM set_config('plpgsql.extra_errors', 'none', true);
    PERFORM set_config('plpgsql.extra_warnings', 'none', true);
END;
$$;
